"""Qwen2.5-VL without torch: cache, padding, layouts, tables of the real sizes."""

import dataclasses
import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from uae_jax.convert.table import flat_names
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.config import Config, TextConfig, VisionConfig
from uae_jax.models.qwen2_5_vl.inputs import layout, pack, patchify, rope_positions, smart_resize
from uae_jax.models.qwen2_5_vl.language import mrope_angles, text_positions
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.weights import table

MANIFESTS = Path(__file__).parents[2] / "shared/manifests"
IMAGE = 29
TINY = Config(
    vision=VisionConfig(
        depth=4,
        hidden_size=16,
        intermediate_size=20,
        num_heads=2,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=(1, 3),
        out_hidden_size=24,
    ),
    text=TextConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=28,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=1e4,
        mrope_section=(1, 1, 1),
        tie_word_embeddings=False,
    ),
    image_token_id=IMAGE,
    vision_start_token_id=27,
    vision_end_token_id=28,
    eos_token_id=30,
    pad_token_id=31,
)


def arguments(config, size=(16, 24)):
    """Patches, layout, tokens, positions and mask of one row with one image."""
    tokens = np.array([1, config.vision_start_token_id, *[config.image_token_id] * (size[0] * size[1] // 64), 3, 4])
    positions, _ = rope_positions(tokens, [(size[0] // 4, size[1] // 4)], config)
    images = np.random.default_rng(0).standard_normal((*size, 3)).astype(np.float32)
    mask = np.tril(np.ones((len(tokens), len(tokens)), bool))
    return patchify(images, config.vision), layout(*size, config.vision)[0], tokens, positions, mask


@pytest.fixture(scope="module")
def tiny():
    """The tiny model, and parameters drawn so that nothing hides behind zeros and ones."""
    model = Qwen2_5_VL(TINY)
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), *arguments(TINY))["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_cached_decoding_equals_uncached(tiny, batch):
    """A prefill and single steps give the hidden states of one pass, with padding on the left and slots to spare."""
    model, params = tiny
    rng = np.random.default_rng(2)
    t, split, spare = 9, 5, 3
    embeds = rng.standard_normal((*batch, t, 24)).astype(np.float32)
    pads = rng.integers(0, 4, batch)
    pads.flat[0] = 3
    positions = np.stack([np.maximum(np.arange(t) - pads[..., None], 0) + axis for axis in range(3)])
    real = np.arange(t) >= pads[..., None]
    mask = np.tril(np.ones((t, t), bool)) & real[..., None, :]
    run = jax.jit(functools.partial(model.apply, {"params": params}, method="hidden"))
    expected, slots = run(embeds, positions, mask)
    wide = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, spare)])
    cache = model.init_cache(batch, t + spare)
    assert cache.k.shape == (2, *batch, t + spare, 2, 6)
    parts = [(0, split), *((i, i + 1) for i in range(split, t))]
    found = []
    for a, b in parts:
        hidden, cache = run(embeds[..., a:b, :], positions[..., a:b], wide[..., a:b, :], cache, jnp.int32(a))
        found.append(hidden)
    assert np.abs(np.concatenate(found, axis=-2) - expected)[real].max() < 1e-5
    assert np.abs(cache.k[..., :t, :, :] - slots.k)[:, real].max() < 1e-5
    assert not np.any(cache.v[..., t:, :, :])


def test_a_cache_write_is_a_slice(tiny):
    """Shared index: no scatter (which a sharded cache would turn into gathers), one update a tensor after the scan."""
    model, params = tiny
    step = functools.partial(model.apply, {"params": params}, method="hidden")
    args = (jnp.zeros((2, 1, 24)), jnp.zeros((3, 2, 1), int), jnp.ones((2, 1, 8), bool), model.init_cache((2,), 8))
    jaxpr = jax.make_jaxpr(step)(*args, jnp.int32(3))
    assert "scatter" not in str(jaxpr)
    assert sum(eqn.primitive.name == "dynamic_update_slice" for eqn in jaxpr.eqns) == 2


def test_padding_windows_change_nothing(tiny):
    """A larger budget, and whatever lies in its padding, neither reaches the features nor breaks the gradients."""
    model, params = tiny
    images = [
        np.random.default_rng(i).standard_normal((*size, 3)).astype(np.float32)
        for i, size in enumerate([(24, 16), (16, 40)])
    ]
    parts = [(patchify(x, TINY.vision), layout(*x.shape[:2], TINY.vision)[0]) for x in images]
    encode = jax.jit(functools.partial(model.apply, method="encode_image"))
    alone = np.concatenate([encode({"params": params}, *part) for part in parts])
    patches, where = pack(parts, 9, 20, TINY.vision)
    padding = where.frames < 0
    assert 16 < padding.sum() < padding.size  # ragged windows and empty ones
    patches[padding] = 1e3 * np.random.default_rng(9).standard_normal((padding.sum(), patches.shape[-1]))
    found = encode({"params": params}, patches, where)
    assert found.shape == (20, 24)
    assert np.abs(found[: len(alone)] - alone).max() < 1e-5

    def loss(params):
        return jnp.sum(model.apply({"params": params}, patches, where, method="encode_image")[: len(alone)] ** 2)

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients["visual"]))


def test_one_layout_serves_all_rows(tiny):
    model, params = tiny
    images = np.random.default_rng(0).standard_normal((2, 3, 24, 16, 3)).astype(np.float32)
    where = layout(24, 16, TINY.vision)[0]
    encode = jax.jit(functools.partial(model.apply, {"params": params}, method="encode_image"))
    found = encode(patchify(images, TINY.vision), jax.tree.map(lambda x: x[None, None], where))
    assert found.shape == (2, 3, 6, 24)
    assert np.abs(found[1, 2] - encode(patchify(images[1, 2], TINY.vision), where)).max() < 1e-5


def test_windows_and_frames_are_apart(tiny):
    """Windowed blocks see their window only; full blocks see their image only."""
    model, params = tiny
    images = [np.random.default_rng(i).standard_normal((32, 32, 3)).astype(np.float32) for i in range(2)]
    parts = [(patchify(x, TINY.vision), layout(32, 32, TINY.vision)[0]) for x in images]
    patches, where = pack(parts, 8, 32, TINY.vision)
    changed = patches.copy()
    changed[5] += 1  # a window of the second image
    encode = jax.jit(functools.partial(model.apply, {"params": params}, method="encode_image"))
    moved = np.abs(encode(changed, where) - encode(patches, where)).max(axis=-1) > 1e-6
    assert moved.tolist() == [False] * 16 + [True] * 16
    # Every window a frame of its own: then the full blocks, too, stay in it, and so must all.
    cut = where._replace(frames=np.broadcast_to(np.arange(8, dtype=np.int32)[:, None], where.frames.shape))
    moved = np.abs(encode(changed, cut) - encode(patches, cut)).max(axis=-1) > 1e-6
    assert np.array_equal(moved, where.order // 4 == 5)


def test_image_features_take_their_places(tiny):
    """In order, per row, with any leading axes; features of an image serve a group of rows."""
    model, params = tiny
    apply = functools.partial(model.apply, {"params": params}, method="embed")
    tokens = np.array([[[1, IMAGE, IMAGE, 2], [IMAGE, 3, 4, IMAGE]], [[5, 6, 7, 8], [9, IMAGE, 1, 2]]])
    features = np.random.default_rng(0).standard_normal((2, 1, 3, 24)).astype(np.float32)
    found = np.asarray(apply(tokens, features))
    expected = np.array(apply(tokens))
    for row in np.ndindex(2, 2):
        at = np.flatnonzero(tokens[row] == IMAGE)
        expected[row][at] = features[row[0], 0, : len(at)]
    assert np.array_equal(found, expected)


def test_compute_types(tiny):
    _, params = tiny
    half = Qwen2_5_VL(TINY, jnp.bfloat16)
    patches, where, tokens, positions, mask = arguments(TINY)
    run = functools.partial(half.apply, {"params": params})
    features = jax.eval_shape(lambda: run(patches, where, method="encode_image"))
    hidden, cache = jax.eval_shape(lambda: run(run(tokens, method="embed"), positions, mask, method="hidden"))
    assert {features.dtype, hidden.dtype, cache.k.dtype, half.init_cache((1,), 2).v.dtype} == {jnp.dtype("bfloat16")}
    logits = jax.jit(half.apply)({"params": params}, patches, where, tokens, positions, mask)
    assert logits.dtype == jnp.float32 and np.isfinite(logits).all()
    assert np.any(logits != logits.astype(jnp.bfloat16))  # accumulated and left in float32


@pytest.mark.parametrize("size", [(16, 24), (40, 8)])
def test_patches_lie_where_the_layout_says(size):
    """Against a loop over patches; NumPy and traced arrays alike, with leading axes."""
    vision = TINY.vision
    images = np.random.default_rng(0).standard_normal((2, 3, *size, 3)).astype(np.float32)
    found = patchify(images, vision)
    where, source = layout(*size, vision)
    assert found.shape == (2, 3, *where.frames.shape, vision.patch_dim)
    for (w, s), index in np.ndenumerate(source):
        if index < 0:
            assert where.frames[w, s] == -1 and not found[:, :, w, s].any()
            continue
        row, column = where.positions[w, s]
        block = (row // 2) * (size[1] // 8) + column // 2
        assert index == 4 * block + 2 * (row % 2) + column % 2
        assert where.order[block] == (w * source.shape[1] + s) // 4
        pixels = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].transpose(0, 1, 4, 2, 3)
        expected = np.repeat(pixels[:, :, :, None], 2, axis=3).reshape(2, 3, -1)
        assert np.array_equal(found[:, :, w, s], expected)
    traced = jax.jit(functools.partial(patchify, config=vision))(images)
    assert np.array_equal(traced, found)


def test_text_counts_alike_on_all_axes():
    positions, following = rope_positions(np.arange(5), [], TINY)
    assert following == 5
    assert np.array_equal(positions, text_positions(jnp.arange(5)))


def test_angles_are_exact():
    """Far positions, at any matmul precision: sections of the frequencies read time, height, width."""
    positions = np.stack([np.arange(30000), np.arange(30000)[::-1], np.arange(30000) // 7])
    with jax.default_matmul_precision("bfloat16"):
        found = jax.jit(mrope_angles, static_argnums=1)(positions, TINY.text)
    speeds = 1e4 ** (-np.arange(3) / 3)
    assert np.abs(found - positions.T * speeds).max() < 30000 * 2e-7


def manifest_of(name):
    file = MANIFESTS / f"qwen2_5_vl_{name}.json.gz"
    if not file.exists():
        pytest.skip(f"no {file.name}")
    return json.loads(gzip.decompress(file.read_bytes()))


def from_manifest(name):
    manifest = manifest_of(name)
    return Config.from_hf(manifest["config"]), {key: tuple(shape) for key, shape in manifest["tensors"].items()}


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_real_tables(name):
    config, expected = from_manifest(name)
    found = {key: entry.shape for entry in table(config) for key in flat_names(entry.names)}
    assert found == expected


def test_parameters_have_the_shapes_of_the_table():
    """Of 3B: 32 = 4 x (7 + 1) vision blocks and 36 layers, stacked."""
    config, _ = from_manifest("3b")
    size = (28 * 3, 28 * 5)
    tokens = np.full(20, config.image_token_id)
    patches = jax.ShapeDtypeStruct((2, 64, config.vision.patch_dim), jnp.float32)
    model = Qwen2_5_VL(config)
    shapes = jax.eval_shape(
        lambda patches: model.init(
            jax.random.key(0),
            patches,
            layout(*size, config.vision)[0],
            tokens,
            np.ones((3, 20), int),
            np.ones((1, 1), bool),
        ),
        patches,
    )
    found = {path: x.shape for path, x in traverse_util.flatten_dict(shapes["params"], sep="/").items()}

    def stacked(names):
        return () if isinstance(names, str) else (len(names), *stacked(names[0]))

    expected = {}
    for entry in table(config):
        zeros = np.broadcast_to(np.float32(0), entry.shape)
        expected[entry.path] = (*stacked(entry.names), *entry.transform.to_jax(zeros).shape)
    assert found == expected
    assert found["visual/blocks/windowed/attn/qkv/kernel"] == (4, 7, 1280, 3840)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 1]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "half the head size"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"vision_config": {"hidden_act": "gelu"}}, "gelu"),
        ({"vision_config": {}}, "vision_config.depth is missing"),
    ],
)
def test_config_errors(change, message):
    assert Config.from_hf(TINY.to_hf()) == TINY
    with pytest.raises(UserError, match=message):
        Config.from_hf({**TINY.to_hf(), **change})


@pytest.mark.parametrize("full", [(0, 3), (1,), (2,), (), (1, 3, 5)])
def test_irregular_full_blocks_are_refused(full):
    config = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, fullatt_block_indexes=full))
    with pytest.raises(UserError, match="every k-th"):
        jax.eval_shape(functools.partial(Qwen2_5_VL(config).init, jax.random.key(0)), *arguments(config))


def test_input_errors():
    image = np.zeros((16, 20, 3), np.float32)
    with pytest.raises(UserError, match="multiples of 8"):
        patchify(image, TINY.vision)
    with pytest.raises(UserError, match="multiples of 8"):
        layout(0, 8, TINY.vision)
    with pytest.raises(UserError, match="200 times"):
        smart_resize(1, 201, 8, 1, 10**6)
    with pytest.raises(UserError, match="2 image placeholders, its images have 1"):
        rope_positions(np.array([IMAGE, IMAGE]), [(2, 2)], TINY)
    with pytest.raises(UserError, match="at token 0"):
        rope_positions(np.array([IMAGE, 1, IMAGE]), [(4, 2)], TINY)
    part = (patchify(np.zeros((16, 24, 3), np.float32), TINY.vision), layout(16, 24, TINY.vision)[0])
    for budget in ((1, 6), (2, 5)):
        with pytest.raises(UserError, match="2 windows and 6 merged tokens"):
            pack([part], *budget, TINY.vision)
