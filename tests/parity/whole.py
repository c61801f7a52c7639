"""Whole systems as they come from the hub, tiny and random: a diffusers pipeline, Qwen2.5-VL, a projector, a tower."""

import dataclasses
import json

import numpy as np

from tests import tiny
from tests.parity import test_flux, test_sd3, test_text_encoders
from tests.parity.conftest import redraw
from tests.parity.test_reconstruct_qwen import PROMPT, SPECIAL, byte_level_tokenizer
from uae_jax import checkpoint
from uae_jax.convert import __main__ as convert
from uae_jax.convert import folder
from uae_jax.models.projector import model as projector
from uae_jax.models.vae.config import Config as VAEConfig

WIDTH, SIZE = 32, 32  # of the captioner, in channels; of images, in pixels
VAE = VAEConfig(
    block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.7,
    shift_factor=0.1,
)  # fmt: skip
# Wider than both CLIP towers' states side by side (64), which are then padded.
JOINT = {"sd3": 72, "flux": 20}
SD3 = dataclasses.replace(
    test_sd3.MEDIUM,
    num_layers=2,
    dual_attention_layers=(),
    out_channels=4,
    pooled_projection_dim=40,
    joint_attention_dim=JOINT["sd3"],
)
FLUX = dataclasses.replace(
    test_flux.DEV, in_channels=16, out_channels=None, num_layers=1, num_single_layers=1, pooled_projection_dim=32
)
SCHEDULERS = {
    "sd3": {"shift": 3.0},
    "flux": {"shift": 3.0, "use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256},
}


def word_tokenizer(words, start, end, pad, length):
    """Words of a letter, between a start (or none) and an end, as transformers saves it."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {**{letter: i + 1 for i, letter in enumerate(words)}, "<unk>": 40, **start, **end, **pad}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*start, "$A", *end]), special_tokens=[*start.items(), *end.items()]
    )
    names = {"eos_token": next(iter(end)), "pad_token": next(iter(pad))}
    if start:
        names["bos_token"] = next(iter(start))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def write_pipeline(path, kind):
    """A diffusers folder of `sd3` or `flux`, with its text towers and their tokenizers."""
    import diffusers

    config = {"sd3": SD3, "flux": FLUX}[kind]
    hf = config.to_hf()
    reference = (test_sd3 if kind == "sd3" else test_flux).build(config)[0]
    reference.save_pretrained(path / "transformer")
    vae = diffusers.AutoencoderKL.from_config(VAE.to_hf())
    redraw(vae)
    vae.save_pretrained(path / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind]).save_pretrained(path / "scheduler")
    towers = {"sd3": ((20, "quick_gelu", "_2"), (20, "gelu", "")), "flux": ((None, "quick_gelu", ""),)}[kind]
    for projection, act, suffix in towers:
        text, _ = test_text_encoders.build_clip(test_text_encoders.clip_variant(2, act, 1, projection))
        text.save_pretrained(path / f"text_encoder{suffix}")
        tokenizer = word_tokenizer("abcdefgh", {"<|startoftext|>": 48}, {"<|endoftext|>": 49}, {"!": 0}, 12)
        tokenizer.save_pretrained(path / f"tokenizer{suffix}")
        if suffix:  # as on the hub
            (path / f"tokenizer{suffix}" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    suffix = "_3" if kind == "sd3" else "_2"
    t5, _ = test_text_encoders.build_t5(dataclasses.replace(test_text_encoders.T5, d_model=JOINT[kind], num_layers=1))
    t5.save_pretrained(path / f"text_encoder{suffix}")
    word_tokenizer("hgfedcba", {}, {"</s>": 41}, {"<pad>": 0}, 512).save_pretrained(path / f"tokenizer{suffix}")
    index = {"_class_name": "pipeline", "transformer": ["diffusers", hf["_class_name"]]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def write_captioner(path):
    """Qwen2.5-VL of one layer, as transformers saves it."""
    import transformers

    tokenizer = byte_level_tokenizer()
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 8,
            "window_size": 32, "fullatt_block_indexes": [0], "out_hidden_size": WIDTH,
        },
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def projector_of(out, activation="gelu"):
    """Config and parameters."""
    rng = np.random.default_rng(0)
    shapes = {"linear_1": (WIDTH, 48), "linear_2": (48, out)}
    params = {
        name: {"kernel": rng.standard_normal(shape) / shape[0] ** 0.5, "bias": rng.standard_normal(shape[1])}
        for name, shape in shapes.items()
    }
    return projector.Config(WIDTH, 48, out, activation=activation), params


def write_tower(path):
    """CLIP of one layer, as transformers saves it."""
    import transformers

    towers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**towers, "vocab_size": 8},
            vision_config={**towers, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
    )
    redraw(clip)
    clip.save_pretrained(path)


def write(where, kind, **changes):
    """A run's folder with where/weights; returns its config."""
    weights = where / "weights"
    write_captioner(weights / "captioner")
    convert.main(["", "import", str(write_pipeline(where / "pipeline", kind)), str(weights)])
    folder.save_model(weights / "projector", *projector_of(JOINT[kind], "gelu" if kind == "sd3" else "silu"))
    write_tower(weights / "clip")
    run = tiny.config(
        weights,
        data__source="folder",
        data__path=str(where / "pictures"),
        data__image_size=SIZE,
        data__batch_size=1,
        monitor=(),
        prompt__caption=PROMPT,
        prompt__redraw_prefix="<|im_start|>user\n",
        prompt__redraw_suffix="<|im_end|>\n",
        prompt__negative="a blue square",
        rl__group_size=2,
        rl__max_tokens=6,
        redraw__prediction="velocity",
        redraw__steps=3,
        redraw__distilled_guidance=1.5,  # see test_flux.py
        **({"redraw__spacing": "diffusers", "redraw__guidance": 4.0} if kind == "sd3" else {"mask_text": False}),
        **changes,
    )
    checkpoint.write_config(where, run.to_dict())
    return run
