"""The text towers that decoders read: CLIP's alone and T5's encoder, against transformers'."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax.convert.table import flat_names, load, param_shape, save
from uae_jax.errors import UserError
from uae_jax.models.clip import weights as clip_weights
from uae_jax.models.clip.config import TextConfig, TextModelConfig
from uae_jax.models.clip.model import CLIPText
from uae_jax.models.t5 import weights as t5_weights
from uae_jax.models.t5.config import Config as T5Config
from uae_jax.models.t5.model import T5Encoder, buckets

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

CLIP = TextModelConfig(
    TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=12,
    ),
    projection_dim=20,
)
# Heads that do not make up the width, and few, small buckets.
T5 = T5Config(
    vocab_size=50,
    d_model=24,
    d_kv=5,
    d_ff=40,
    num_layers=3,
    num_heads=3,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)


def clip_variant(eos: int, act: str, layers: int = 3, projection: int | None = 20) -> TextModelConfig:
    text = dataclasses.replace(CLIP.text, eos_token_id=eos, hidden_act=act, num_hidden_layers=layers)
    return TextModelConfig(text, projection)


def build_clip(config: TextModelConfig):
    """The reference with every parameter re-drawn, and our parameters."""
    hf = config.to_hf()
    reference = getattr(transformers, hf["architectures"][0])(transformers.CLIPTextConfig.from_dict(hf)).eval()
    redraw(reference)
    found = {clip_weights.canonical_text(name): x for name, x in tensors(reference).items()}
    return reference, load(clip_weights.text_table(config), found)


def build_t5(config: T5Config):
    reference = transformers.T5EncoderModel(transformers.T5Config.from_dict(config.to_hf())).eval()
    redraw(reference)
    found = {k: v for k, v in tensors(reference).items() if k not in t5_weights.ties(config)}
    return reference, load(t5_weights.table(config), found)


def clip_tokens(batch: tuple[int, ...] = (4,)) -> np.ndarray:
    """Each row holds 40 twice, and the highest id, 49, elsewhere."""
    rng = np.random.default_rng(0)
    rows = np.stack([rng.permutation(11) for _ in range(int(np.prod(batch)))])
    tokens = np.choose(np.minimum(rows, 4), [40, 40, 49, 49, 0]) + (rows >= 4) * rng.integers(0, 40, rows.shape)
    return tokens.reshape(*batch, 11)


# CLIP-L as published (eos 2 is its config's mistake), OpenCLIP bigG as SD3.5 has it, a config of new transformers, and
# FLUX's tower without a projection, here with a single layer.
@pytest.mark.parametrize(
    "config",
    [
        clip_variant(2, "quick_gelu"),
        clip_variant(2, "gelu"),
        clip_variant(40, "gelu"),
        clip_variant(40, "gelu", 1, None),
    ],
    ids=["clip-l", "bigg", "new-eos", "no-projection"],
)
def test_clip_text(config):
    reference, params = build_clip(config)
    tokens = clip_tokens()
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens), output_hidden_states=True)
    projected = config.projection_dim is not None
    hidden, pooled = jax.jit(CLIPText(config).apply)({"params": params}, tokens)
    assert pooled.shape == (4, 20 if projected else 32)
    assert np.abs(pooled).max() > 1
    np.testing.assert_allclose(hidden, expected.hidden_states[-2].numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        pooled, (expected.text_embeds if projected else expected.pooler_output).numpy(), rtol=0, atol=1e-4
    )


def test_clip_text_leading_axes_and_tokens_past_the_end():
    config = clip_variant(40, "gelu")
    _, params = build_clip(config)
    apply = jax.jit(CLIPText(config).apply)
    tokens = clip_tokens((2, 3))
    hidden, pooled = apply({"params": params}, tokens)
    flat = apply({"params": params}, tokens.reshape(6, 11))
    assert hidden.shape == (2, 3, 11, 32) and pooled.shape == (2, 3, 20)
    np.testing.assert_allclose(pooled.reshape(6, 20), flat[1], rtol=0, atol=1e-5)
    end = (tokens == 40).argmax(-1)
    cut = np.where(np.arange(11) > end[..., None], 7, tokens)
    np.testing.assert_array_equal(apply({"params": params}, cut)[1], pooled)
    with pytest.raises(UserError, match="at most 12 tokens, not 22"):
        CLIPText(config).apply({"params": params}, np.tile(tokens, 2))


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_t5(tokens):
    """Longer than the maximum distance, too; some rows masked as in training, where padding is not seen."""
    reference, params = build_t5(T5)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (4, tokens))
    mask = np.arange(tokens) < rng.integers(1, tokens + 1, 4)[:, None]
    apply = jax.jit(T5Encoder(T5).apply)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
        masked = reference(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(apply({"params": params}, ids), expected, rtol=0, atol=1e-4)
    found = apply({"params": params}, ids, mask)
    np.testing.assert_allclose(found[mask], masked[mask], rtol=0, atol=1e-4)


def test_t5_epsilon_of_the_norms():
    reference, _ = build_t5(T5)
    with torch.no_grad():
        reference.shared.weight.mul_(0.003)
        ids = np.random.default_rng(0).integers(0, 50, (4, 9))
        expected = reference(torch.from_numpy(ids)).last_hidden_state.numpy()
    found = {k: v for k, v in tensors(reference).items() if k not in t5_weights.ties(T5)}
    params = load(t5_weights.table(T5), found)
    np.testing.assert_allclose(jax.jit(T5Encoder(T5).apply)({"params": params}, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [T5, T5Config()], ids=["tiny", "xxl"])
def test_t5_buckets(config):
    """Every distance, those on a boundary between buckets included."""
    attention = transformers.models.t5.modeling_t5.T5Attention
    offsets = torch.arange(600)[None] - torch.arange(600)[:, None]
    size = {
        "num_buckets": config.relative_attention_num_buckets,
        "max_distance": config.relative_attention_max_distance,
    }
    np.testing.assert_array_equal(buckets(600, config), attention._relative_position_bucket(offsets, **size).numpy())


def test_t5_leading_axes_are_free():
    _, params = build_t5(T5)
    ids = np.random.default_rng(1).integers(0, 50, (2, 3, 9))
    mask = np.random.default_rng(2).random((2, 3, 9)) < 0.7
    apply = jax.jit(T5Encoder(T5).apply)
    grouped = apply({"params": params}, ids, mask)
    flat = apply({"params": params}, ids.reshape(6, 9), mask.reshape(6, 9))
    assert grouped.shape == (2, 3, 9, 24)
    np.testing.assert_allclose(grouped.reshape(flat.shape), flat, rtol=0, atol=1e-5)


# The sizes that the pipelines hold: CLIP-L, OpenCLIP bigG, FLUX's CLIP-L, T5 v1.1 XXL, and their parameter counts.
BIGG = TextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"
)
REAL = {
    "clip-l": (TextModelConfig(TextConfig(), 768), 123_650_304),
    "clip-bigg": (TextModelConfig(BIGG, 1280), 694_659_840),
    "clip-l-flux": (TextModelConfig(TextConfig(), None), 123_060_480),
    "t5-xxl": (T5Config(), 4_762_310_656),
}


@pytest.mark.parametrize("name", REAL)
def test_tables_of_the_real_sizes(name):
    config, count = REAL[name]
    hf = config.to_hf()
    is_t5 = isinstance(config, T5Config)
    with torch.device("meta"):
        reference_class = getattr(transformers, hf["architectures"][0])
        reference = reference_class((transformers.T5Config if is_t5 else transformers.CLIPTextConfig).from_dict(hf))
    table = t5_weights.table(config) if is_t5 else clip_weights.text_table(config)
    expected = {clip_weights.canonical_text(k): tuple(x.shape) for k, x in reference.state_dict().items()}
    if is_t5:
        expected = {k: tuple(x.shape) for k, x in reference.state_dict().items() if k not in t5_weights.ties(config)}
    assert {tensor: entry.shape for entry in table for tensor in flat_names(entry.names)} == expected
    assert sum(int(np.prod(shape)) for shape in expected.values()) == count
    model = T5Encoder(config) if is_t5 else CLIPText(config)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 77), np.int32))
    shapes = {
        "/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(fresh["params"])
    }
    assert shapes == {entry.path: param_shape(entry) for entry in table}


def test_configs():
    for config in (CLIP, clip_variant(40, "gelu", 1, None)):
        hf = transformers.CLIPTextConfig.from_dict(config.to_hf()).to_dict()
        assert TextModelConfig.from_hf(config.to_hf()) == TextModelConfig.from_hf(hf) == config
    with pytest.raises(UserError, match="CLIPModel"):
        TextModelConfig.from_hf({"architectures": ["CLIPModel"]})
    hf = T5.to_hf()
    assert T5Config.from_hf(hf) == T5Config.from_hf(transformers.T5Config.from_dict(hf).to_dict()) == T5
    with pytest.raises(UserError, match="feed_forward_proj 'relu'"):
        T5Config.from_hf({**hf, "feed_forward_proj": "relu"})
    with pytest.raises(UserError, match="T5ForConditionalGeneration"):
        T5Config.from_hf({**hf, "architectures": ["T5ForConditionalGeneration"]})
    with pytest.raises(UserError, match=r"missing fields \['d_kv'\]"):
        T5Config.from_hf({k: v for k, v in hf.items() if k != "d_kv"})


def test_round_trips_are_bit_identical():
    reference, params = build_clip(CLIP)
    saved = save(clip_weights.text_table(CLIP), params)
    assert saved.keys() == tensors(reference).keys()
    for name, value in saved.items():
        assert np.array_equal(value, tensors(reference)[name]), name
    reference, params = build_t5(T5)
    saved = save(t5_weights.table(T5), params)
    assert saved.keys() == tensors(reference).keys() - t5_weights.ties(T5).keys()
    for name, value in saved.items():
        assert np.array_equal(value, tensors(reference)[name]), name
