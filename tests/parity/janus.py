"""Tiny random Januses of transformers for the parity tests, and what transformers generates with them."""

import numpy as np
import pytest

from tests.parity.conftest import redraw

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

BOS, EOS, PAD, START, END, IMAGE = 56, 57, 58, 59, 60, 61  # of 64 tokens
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
# Text sizes, vision sizes, and whether the head is tied to the embedding.
CONFIGS = {
    "untied": (
        {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "mlp_ratio": 3.0, "depth": 2},
        False,
    ),
    "tied": (
        {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2},
        {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "mlp_ratio": 4.0, "depth": 3},
        True,
    ),
}
SIDE, PATCH, CODES = 32, 8, 96  # pixels, pixels, codes in the book: 16 features in and 16 codes out an image


def tiny_janus(kind: str = "untied"):
    """A random `JanusForConditionalGeneration` of `CONFIGS`, every weight re-drawn."""
    text, vision, tied = CONFIGS[kind]
    width = text["hidden_size"]
    config = transformers.JanusConfig(
        text_config=dict(
            text,
            **TOKENS,
            model_type="llama",
            vocab_size=64,
            intermediate_size=56,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e3},
            max_position_embeddings=256,
            tie_word_embeddings=tied,
        ),
        vision_config=dict(
            vision,
            image_size=SIDE,
            patch_size=PATCH,
            projection_dim=width,
            num_image_tokens=(SIDE // PATCH) ** 2,
            layer_norm_eps=1e-3,  # so large that another one shows
        ),
        vq_config={
            "embed_dim": 8,
            "num_embeddings": CODES,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "projection_dim": width,
            "image_token_embed_dim": width,
            "num_hidden_layers": vision["depth"],
        },
        image_token_id=IMAGE,
        tie_word_embeddings=tied,
    )
    config._attn_implementation = "eager"
    model = transformers.JanusForConditionalGeneration(config).eval()
    redraw(model)
    model.generation_config.update(**TOKENS)
    model.generation_config.generation_kwargs = {"boi_token_id": START}
    return model


def picture(*seeds: int) -> np.ndarray:
    """Random pictures [seeds, H, W, 3] in 0..1."""
    return np.stack([np.random.default_rng(seed).random((SIDE, SIDE, 3), np.float32) for seed in seeds])


def as_pixels(pictures: np.ndarray):
    """Pictures [b, H, W, 3] in 0..1 as transformers reads them: [b, 3, H, W] in -1..1."""
    return torch.from_numpy(2 * pictures.transpose(0, 3, 1, 2) - 1)


def greedy_text(model, tokens: np.ndarray, mask: np.ndarray, pictures: np.ndarray, new: int):
    """transformers' `new` most likely tokens [b, new] after prompts [b, t], and the logits [b, new, v] they come from.

    Args:
      mask: bool [b, t]; False where a row is padded (on the left).
      pictures: one a row, [b, H, W, 3] in 0..1.
    """
    found = model.generate(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        pixel_values=as_pixels(pictures),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences[:, tokens.shape[1] :].numpy(), torch.stack(found.logits, dim=1).numpy()


def greedy_codes(model, tokens: np.ndarray, mask: np.ndarray, guidance: float) -> np.ndarray:
    """transformers' most likely image tokens [b, n] after prompts [b, t] that end with START, with guidance."""
    found = model.generate(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        generation_mode="image",
        guidance_scale=guidance,
        do_sample=False,
    )
    return found.numpy()
