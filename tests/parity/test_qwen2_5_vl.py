"""Qwen2.5-VL against transformers: weights travel as safetensors, numbers agree within 1e-4."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.parity.conftest import redraw
from uae_jax.convert.table import load, save
from uae_jax.models.qwen2_5_vl.config import Config, VisionConfig
from uae_jax.models.qwen2_5_vl.inputs import (
    IMAGE_MEAN,
    IMAGE_STD,
    layout,
    pack,
    patchify,
    rope_positions,
    smart_resize,
)
from uae_jax.models.qwen2_5_vl.language import LanguageModel, text_positions
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")
processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

TOLERANCE = 1e-4
START, END, IMAGE, VIDEO, EOS, PAD = 58, 59, 60, 61, 62, 63
# Windows of 2 and of 3 merged tokens a side; ragged, even and smallest images, in units of 8 pixels.
SIZES = [(24, 40), (32, 16), (8, 8), (48, 24)]
# sizes of the text and vision parts
CONFIGS = {
    "tied": (
        {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3},
        {"hidden_size": 32, "num_heads": 2, "window_size": 16, "fullatt_block_indexes": [1, 3]},
    ),
    "untied": (
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2},
        {"hidden_size": 48, "num_heads": 3, "window_size": 24, "fullatt_block_indexes": [3]},
    ),
}
SECTIONS = {"tied": [1, 2, 3], "untied": [3, 1, 4]}


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """(transformers' model, our model, our parameters, tensors as saved)."""
    text, vision = CONFIGS[request.param]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS[request.param]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            text,
            vocab_size=64,
            intermediate_size=56,
            rms_norm_eps=1e-6,
            rope_parameters=rope,
            bos_token_id=PAD,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        vision_config=dict(vision, depth=4, intermediate_size=44, patch_size=4, out_hidden_size=text["hidden_size"]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=request.param == "tied",
    )
    config._attn_implementation = "eager"
    reference = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    redraw(reference)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    files = load_file(folder / "model.safetensors")
    ours = Config.from_hf(json.loads((folder / "config.json").read_text()))
    return reference, Qwen2_5_VL(ours), load(table(ours), files), files


def picture(size, seed=0):
    """Normalised pixels [height, width, 3]."""
    return np.random.default_rng(seed).standard_normal((*size, 3)).astype(np.float32)


def hub_patches(size, config, seed=0):
    """The same picture as transformers wants it: [patches, patch_dim] and its grid."""
    _, source = layout(*size, config)
    patches = patchify(picture(size, seed), config)
    flat = np.empty(((source >= 0).sum(), patches.shape[-1]), np.float32)
    flat[source[source >= 0]] = patches[source >= 0]
    return torch.from_numpy(flat), [1, size[0] // config.patch_size, size[1] // config.patch_size]


def prompts(config):
    """Two rows, right-aligned: two ragged images among text, and one image with little text."""
    rng = np.random.default_rng(5)
    rows, sizes = [], [[SIZES[0], SIZES[1]], [SIZES[3]]]
    for images, words in zip(sizes, ([4, 3, 6], [2, 5]), strict=True):
        tokens = list(rng.integers(0, START, words[0]))
        for (height, width), count in zip(images, words[1:], strict=True):
            tokens += [START, *[IMAGE] * (height * width // 64), END, *rng.integers(0, START, count)]
        rows.append(np.array(tokens))
    length = max(map(len, rows))
    tokens = np.stack([np.pad(row, (length - len(row), 0), constant_values=PAD) for row in rows])
    return tokens, np.array([length - len(row) for row in rows]), sizes


def embed(model, params, tokens, patches, layouts):
    """Token embeddings with the image features in them."""
    features = model.apply({"params": params}, patches, layouts, method="encode_image")
    return model.apply({"params": params}, tokens, features, method="embed")


@pytest.fixture(scope="module")
def batch(pair):
    """Inputs of a batch for both models, and what transformers makes of them."""
    _, model, _, _ = pair
    vision = model.config.vision
    tokens, pads, sizes = prompts(model.config)
    seeds = iter(range(10))
    hub = [hub_patches(size, vision, next(seeds)) for row in sizes for size in row]
    inputs = {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.from_numpy((np.arange(tokens.shape[1]) >= pads[:, None]).astype(np.int64)),
        "pixel_values": torch.cat([patches for patches, _ in hub]),
        "image_grid_thw": torch.tensor([grid for _, grid in hub]),
        "mm_token_type_ids": torch.from_numpy((tokens == IMAGE).astype(np.int32)),
    }
    seeds = iter(range(10))
    packed = [
        pack([(patchify(picture(size, next(seeds)), vision), layout(*size, vision)[0]) for size in row], 12, 26, vision)
        for row in sizes
    ]
    patches, layouts = jax.tree.map(lambda *rows: np.stack(rows), *packed)
    positions = np.zeros((3, *tokens.shape), np.int32)
    following = np.zeros(len(tokens), np.int32)
    for i, (pad, row) in enumerate(zip(pads, sizes, strict=True)):
        grids = [(height // vision.patch_size, width // vision.patch_size) for height, width in row]
        positions[:, i, pad:], following[i] = rope_positions(tokens[i, pad:], grids, model.config)
    return inputs, tokens, pads, patches, layouts, positions, following


def test_tables_invert(pair):
    """What is saved is what was loaded, bit for bit, under the hub's names."""
    _, model, params, files = pair
    assert set(params) == {"visual", "language"}
    saved = save(table(model.config), params)
    assert saved.keys() == files.keys()
    for name, tensor in files.items():
        assert saved[name].dtype == tensor.dtype and np.array_equal(saved[name], tensor), name


def test_config_travels(pair):
    """The hub's flat layout and v5's nested one say the same, and transformers reads what we write."""
    reference, model, _, _ = pair
    written = model.config.to_hf()
    assert Config.from_hf(written) == model.config
    theirs = transformers.Qwen2_5_VLConfig(**json.loads(json.dumps(written)))
    assert Config.from_hf(theirs.to_dict()) == model.config
    rope = reference.config.text_config.rope_parameters
    assert rope.items() <= theirs.text_config.rope_parameters.items()
    for name in ("num_key_value_heads", "rms_norm_eps", "eos_token_id", "pad_token_id"):
        assert getattr(theirs.text_config, name) == getattr(reference.config.text_config, name)
    assert theirs.tie_word_embeddings == reference.config.tie_word_embeddings
    assert theirs.vision_config.fullatt_block_indexes == reference.config.vision_config.fullatt_block_indexes


@pytest.mark.parametrize(("size", "contrast"), [(SIZES[0], 1), (SIZES[2], 1e-2), (SIZES[3], 1)])
def test_vision_features(pair, size, contrast):
    """A nearly flat picture brings the norms' epsilon out."""
    reference, model, params, _ = pair
    vision = model.config.vision
    patches, grid = hub_patches(size, vision)
    with torch.no_grad():
        expected = reference.model.visual(contrast * patches, torch.tensor([grid])).pooler_output.numpy()
    here = jax.tree.map(lambda x: x[None, None], layout(*size, vision)[0])

    @jax.jit
    def encode(images):
        return model.apply({"params": params}, patchify(images, vision), here, method="encode_image")

    found = encode(np.float32(contrast) * picture(size)[None, None])
    assert found.shape == (1, 1, *expected.shape)
    assert np.abs(found[0, 0] - expected).max() < TOLERANCE


def test_vision_blocks(pair):
    """Every prefix that ends with a full block, before the merger."""
    reference, model, params, _ = pair
    vision, size = model.config.vision, SIZES[0]
    seen = []
    hooks = [b.register_forward_hook(lambda m, i, output: seen.append(output)) for b in reference.model.visual.blocks]
    patches, grid = hub_patches(size, vision)
    with torch.no_grad():
        reference.model.visual(patches, torch.tensor([grid]))
    for hook in hooks:
        hook.remove()
    where, _ = layout(*size, vision)
    for periods in range(1, vision.depth // vision.period + 1):
        part = dataclasses.replace(model.config.vision, depth=periods * vision.period)
        part = dataclasses.replace(
            part, fullatt_block_indexes=tuple(i for i in vision.fullatt_block_indexes if i < part.depth)
        )
        cut = {**params["visual"], "blocks": jax.tree.map(lambda x, n=periods: x[:n], params["visual"]["blocks"])}
        shorter = Qwen2_5_VL(dataclasses.replace(model.config, vision=part))
        encode = jax.jit(functools.partial(shorter.apply, method="encode_image"))
        found = encode({"params": {"visual": cut}}, patchify(picture(size), vision), where)
        with torch.no_grad():
            merged = reference.model.visual.merger(seen[part.depth - 1]).numpy()
        # transformers' window order has no padding: drop ours.
        ranks = np.argsort(np.argsort(where.order))
        assert np.abs(found - merged[ranks]).max() < TOLERANCE


def test_rope_positions(pair, batch):
    reference, _, _, _ = pair
    inputs, _, _, _, _, positions, following = batch
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    expected, delta = reference.model.get_rope_index(**{name: inputs[name] for name in names})
    assert np.array_equal(positions, expected.numpy())
    assert np.array_equal(following, inputs["attention_mask"].sum(1).numpy() + delta[:, 0].numpy())


def test_hidden_states_and_logits(pair, batch):
    """Two images in one prompt, left padding, every layer, and logits."""
    reference, model, params, _ = pair
    inputs, tokens, pads, patches, layouts, positions, _ = batch
    seen = []
    hooks = [
        layer.register_forward_hook(lambda m, i, output: seen.append(output))
        for layer in reference.model.language_model.layers
    ]
    with torch.no_grad():
        expected = reference(**inputs).logits.numpy()
        states = [reference.model.language_model.norm(state).numpy() for state in seen]
    for hook in hooks:
        hook.remove()
    slots = np.arange(tokens.shape[1])
    real = slots >= pads[:, None]
    mask = (slots[:, None] >= slots) & real[:, None, :]
    embeds = jax.jit(functools.partial(embed, model))(params, tokens, patches, layouts)
    for depth, state in enumerate(states, start=1):
        part = LanguageModel(dataclasses.replace(model.config.text, num_layers=depth))
        cut = {
            **params["language"],
            "layers": jax.tree.map(lambda x, n=depth: x[:n], params["language"]["layers"]),
        }
        hidden, cache = jax.jit(part.apply)({"params": cut}, embeds, positions, mask)
        assert np.abs(hidden - state)[real].max() < TOLERANCE
        assert cache.k.shape[:3] == (depth, *tokens.shape)
    found = jax.jit(model.apply)({"params": params}, patches, layouts, tokens, positions, mask)
    assert found.dtype == jnp.float32 and found.shape == expected.shape
    assert np.abs(found - expected)[real].max() < TOLERANCE


def test_greedy_captions(pair, batch):
    """Prefill once, then a token at a time at one slot for the whole batch: transformers' tokens and logits."""
    reference, model, params, _ = pair
    inputs, tokens, pads, patches, layouts, positions, following = batch
    new = 12
    reference.model.rope_deltas = None
    expected = reference.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    start = tokens.shape[1]
    slots = np.arange(start + new)
    visible = slots >= pads[:, None]
    apply = functools.partial(model.apply, {"params": params})

    @jax.jit
    def prefill(cache):
        mask = (slots[:start, None] >= slots) & visible[:, None, :]
        hidden, cache = apply(embed(model, params, tokens, patches, layouts), positions, mask, cache, method="hidden")
        return apply(hidden[:, -1], method="logits"), cache

    @jax.jit
    def decode(token, i, cache):
        mask = (visible & (slots <= start + i))[:, None, :]
        embeds = apply(token[:, None], method="embed")
        at = text_positions(following[:, None] + i)
        hidden, cache = apply(embeds, at, mask, cache, start + i, method="hidden")
        return apply(hidden[:, -1], method="logits"), cache

    logits, cache = prefill(model.init_cache((2,), start + new))
    caption = []
    for i in range(new):
        assert np.abs(logits - expected.logits[i].numpy()).max() < TOLERANCE
        caption.append(jnp.argmax(logits, -1))
        logits, cache = decode(caption[-1], jnp.int32(i), cache)
    found = np.stack(caption, axis=1)
    assert np.array_equal(found, expected.sequences[:, start:].numpy())
    assert all(len(set(row)) > 3 for row in found.tolist())  # otherwise there was little to get wrong


def test_image_processor():
    """Sizes, pixel statistics and patch order of transformers' processor."""
    config = VisionConfig(32, 1280, 3420, 16, 14, 112, (7, 15, 23, 31), 2048)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 900, (200, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            args = (height, width, 28, 56 * 56, 500 * 28 * 28)
            assert smart_resize(*args) == processing.smart_resize(*args)
    assert smart_resize(70, 98, 28, 1, 10**6) == (56, 112)  # 2.5 and 3.5 go to the even neighbour
    height, width = 140, 196
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = processing.Qwen2VLImageProcessorPil()(Image.fromarray(pixels), return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    patches = patchify((pixels / np.float32(255) - IMAGE_MEAN) / IMAGE_STD, config)
    _, source = layout(height, width, config)
    assert np.array_equal(np.sort(source[source >= 0]), np.arange(len(expected["pixel_values"])))
    assert np.abs(patches[source >= 0] - expected["pixel_values"][source[source >= 0]]).max() < 1e-5
    assert not patches[source < 0].any() and (source < 0).any()
