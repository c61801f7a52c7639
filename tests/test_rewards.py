"""Rewards: resizing, cosines, weighted sums, and the grammar as a table over token ids."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uae_jax import pixels, rewards
from uae_jax.data.shapes import grammar, tokenizer
from uae_jax.data.shapes.grammar import WORDS, Description, Mention
from uae_jax.data.shapes.scene import sample_scene
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.clip.config import Config, TextConfig, VisionConfig
from uae_jax.models.clip.model import CLIP

patient = settings(deadline=None, max_examples=100)


def images(*shape, seed=0):
    return np.random.default_rng(seed).random((*shape, 3), np.float32)


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width, size", [(48, 48, 48), (48, 48, 20), (10, 10, 24), (40, 30, 16)])
def test_normalised_shape_and_range(height, width, size):
    """Black and white stripes: a cubic overshoots there, and pixels outside 0..1 are none."""
    striped = np.broadcast_to((np.arange(width) // 3 % 2)[:, None], (2, 3, height, width, 3)).astype(np.float32)
    found = rewards.normalised(jnp.asarray(striped), size)
    assert found.shape == (2, 3, size, size, 3)
    pixels = found * rewards.CLIP_STD + rewards.CLIP_MEAN
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert pixels.min() < 0.2 and pixels.max() > 0.8


@pytest.mark.parametrize("side, size", [(64, 24), (16, 40)])
def test_normalised_resizes_as_clips_own_preprocessing(side, size):
    """PIL's bicubic, anti-aliased, channel by channel in float."""
    x = images(side, side)
    channels = [Image.fromarray(x[..., i]).resize((size, size), Image.Resampling.BICUBIC) for i in range(3)]
    expected = np.stack([np.clip(np.asarray(c), 0, 1) for c in channels], -1)
    found = rewards.normalised(jnp.asarray(x), size)
    np.testing.assert_allclose(found, (expected - rewards.CLIP_MEAN) / rewards.CLIP_STD, atol=1e-4)


def test_normalised_without_resizing():
    x = images(2, 8, 8)
    expected = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(rewards.normalised(jnp.asarray(x), 8), expected, atol=1e-6)


# ---- cosines ---------------------------------------------------------------------------------------------------------


def flat(params, x):
    """A tower that looks at the pixels alone."""
    return rewards.unit(x.reshape(*x.shape[:-3], -1) - params)


def test_unit():
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    found = rewards.unit(jnp.asarray(x * 1e3, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, atol=1e-6)
    assert (
        not rewards.unit(jnp.zeros(4)).any()
        and jnp.isfinite(jax.grad(lambda x: rewards.unit(x).sum())(jnp.zeros(4))).all()
    )


def test_similarities_are_cosines_with_the_own_source():
    sources, redrawn = images(2, 4, 4), images(2, 3, 4, 4, seed=1)
    redrawn[0, 1] = sources[0]
    redrawn[1, 2] = 1 - sources[1]
    found = rewards.similarities({"a": flat, "b": flat}, {"a": 0.5, "b": -9.0}, sources, redrawn)
    assert found.keys() == {"a", "b"}
    for name, shift in (("a", 0.5), ("b", -9.0)):
        x, y = (v.reshape(*v.shape[:-3], -1).astype(float) - shift for v in (sources, redrawn))
        norms = np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(y, axis=-1)
        expected = (x[:, None] * y).sum(-1) / norms
        assert found[name].shape == (2, 3)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert np.isclose(found["a"][0, 1], 1, atol=1e-6) and np.isclose(found["a"][1, 2], -1, atol=1e-6)


@patient
@given(st.integers(0, 2**31), st.floats(-3, 3))
def test_cosines_are_bounded(seed, shift):
    found = cosine(images(2, 4, 4, seed=seed), images(2, 3, 4, 4, seed=seed + 1), shift)
    assert np.abs(found).max() <= 1 + 1e-6


@jax.jit
def cosine(x, y, shift):
    return rewards.similarities({"flat": flat}, {"flat": shift}, x, y)["flat"]


def test_cosines_are_float32_on_every_platform():
    """Samples of a group differ in the third digit: a TPU's default precision would round that away."""
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = jax.make_jaxpr(cosine)(images(2, 4, 4), images(2, 3, 4, 4), 0.0)
    assert "preferred_element_type=float32" in str(jaxpr) and "BF16" not in str(jaxpr) and "HIGHEST" in str(jaxpr)


def test_clip_tower():
    config = Config(
        VisionConfig(16, 24, 1, 2, image_size=12, patch_size=6), TextConfig(11, 16, 24, 1, 2, 5), projection_dim=8
    )
    module = CLIP(config)
    x = images(2, 3, 20, 20)
    fresh = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)), jnp.zeros((1, 5), int))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), fresh)
    features = jax.jit(rewards.tower(config, jnp.float32))
    found = features(params, x)
    assert found.shape == (2, 3, 8)
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1, atol=1e-5)
    seen = pixels.process(x, pixels.processing(config))
    raw = jax.jit(lambda p, x: apply(module, p, x, method="image_features"))(params, seen)
    np.testing.assert_allclose(found, raw / jnp.linalg.norm(raw, axis=-1, keepdims=True), atol=1e-5)


def test_weighted_sum():
    values = {name: jnp.full((2, 3), x) for name, x in (("clip", 0.5), ("other", 2.0), ("monitor", jnp.nan))}
    found = rewards.weighted_sum(values, {"clip": 1.0, "other": -0.25})
    assert found.shape == (2, 3) and (found == 0.0).all()
    assert (rewards.weighted_sum(values, {"clip": 1.0}) == values["clip"]).all()
    assert jnp.isnan(rewards.weighted_sum(values, {"clip": 1.0, "monitor": 1.0})).all()
    with pytest.raises(KeyError, match="lpips"):
        rewards.weighted_sum(values, {"lpips": 1.0})


def test_products_are_terms_and_name_their_towers():
    values = {"clip": jnp.full((2, 3), 0.5), "dinov2": jnp.full((2, 3), -0.5), "wellformed": jnp.eye(2, 3)}
    weights = {"clip": 2.0, "clip*dinov2*wellformed": 4.0}
    assert np.array_equal(rewards.weighted_sum(values, weights), 1.0 - np.eye(2, 3))
    config = types.SimpleNamespace(reward={"length": 1.0, **weights}, monitor=("dinov2", "siglip"))
    assert rewards.tower_names(config) == ["clip", "dinov2", "siglip"]


def test_rewards_of_the_caption_alone():
    end = TOKENIZER.token_to_id("<|im_end|>")
    tokens = np.array([[*TOKENIZER.encode("a square").ids, end, 0], [end] * 4])
    lengths = jnp.array([2, 4])
    found = rewards.of_text({"clip*wellformed": 1.0, "length": 0.1}, jnp.asarray(tokens), lengths, 2, AUTOMATON)
    assert {k: v.tolist() for k, v in found.items()} == {"length": [1.0, 0.5], "wellformed": [1.0, 0.0]}
    assert rewards.of_text({"clip": 1.0}, jnp.asarray(tokens), lengths, 2, AUTOMATON) == {}
    with pytest.raises(UserError, match="no grammar"):
        rewards.of_text({"wellformed": 1.0}, jnp.asarray(tokens), lengths, 2, None)


def test_what_is_no_tower_is_refused():
    with pytest.raises(UserError, match="no image tower"):
        rewards.tower(TextConfig(), jnp.float32)


# ---- grammar ---------------------------------------------------------------------------------------------------------

TOKENIZER = tokenizer.build()
AUTOMATON = rewards.Automaton(*grammar.automaton(TOKENIZER))
LENGTH = 40
well_formed = jax.jit(functools.partial(rewards.well_formed, automaton=AUTOMATON))


def accepted(texts: list[str], filler: int) -> list[bool]:
    """Eight captions [4, 2, t]; behind each its end token and anything at all."""
    tokens = np.full((8, LENGTH), filler, np.int32)
    lengths = np.zeros(8, np.int32)
    for i, text in enumerate(texts):
        ids = TOKENIZER.encode(text).ids
        tokens[i, : len(ids)] = ids
        tokens[i, len(ids) : len(ids) + 1] = TOKENIZER.token_to_id("<|im_end|>")
        lengths[i] = len(ids)
    return (
        np.asarray(well_formed(tokens.reshape(4, 2, LENGTH), lengths.reshape(4, 2))).reshape(8)[: len(texts)].tolist()
    )


def maybe(n):
    return st.none() | st.integers(0, n - 1)


mentions = st.builds(Mention, st.integers(0, 5), maybe(8), maybe(2), maybe(9))
written = st.builds(Description, st.lists(mentions, max_size=5).map(tuple), maybe(4)).map(grammar.write)


@st.composite
def damaged(draw):
    """A caption with one word replaced, dropped or doubled, or two swapped."""
    words = draw(written).split(" ")
    i = draw(st.integers(0, len(words) - 1))
    before, word, after = words[:i], words[i], words[i + 1 :]
    other = draw(st.sampled_from(WORDS))
    damage = [[*before, other, *after], [*before, *after], [*before, word, word, *after]]
    damage += [[*before, after[0], word, *after[1:]]] if after else []
    return " ".join(draw(st.sampled_from(damage)))


texts = written | damaged() | st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


@patient
@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 36))
def test_well_formed_agrees_with_the_parser(batch, filler):
    assert accepted(batch, filler) == [grammar.parse(text) is not None for text in batch]


@patient
@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1)), min_size=1, max_size=8))
def test_true_captions_are_well_formed_and_cut_ones_agree(drawn):
    rng = np.random.default_rng(0)
    captions = [grammar.caption(sample_scene(1, index), rng, detail) for index, detail in drawn]
    assert all(accepted(captions, 0))
    cut = [
        " ".join(text.split(" ")[: index % len(text.split(" "))])
        for text, (index, _) in zip(captions, drawn, strict=True)
    ]
    assert accepted(cut, 7) == [grammar.parse(text) is not None for text in cut]


def test_words_after_a_special_token_are_malformed():
    end = TOKENIZER.token_to_id("<|im_end|>")
    ids = TOKENIZER.encode("a square").ids
    tokens = np.array([[*ids, end, *ids], [*ids, end, 0, 0]])
    assert rewards.well_formed(jnp.asarray(tokens), jnp.array([2, 2]), AUTOMATON).all()
    assert not rewards.well_formed(jnp.asarray(tokens), jnp.array([5, 3]), AUTOMATON).any()
    assert not rewards.well_formed(jnp.asarray(tokens), jnp.array([0, 1]), AUTOMATON).any()
