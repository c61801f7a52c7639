"""Prompts with images of any size in one static shape, on the tiny random system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from uae_jax import sharding, step, system
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl import inputs
from uae_jax.models.qwen2_5_vl.prompts import Budget, Processor, alike, batch, expand, needed
from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Sampling
from uae_jax.step import STARTING_WEIGHTS
from uae_jax.umm import caption


@pytest.fixture(scope="module")
def built(weights):
    config = tiny.config(weights)
    return system.load(config, sharding.make_mesh(config))


def normalised(height, width, seed=0):
    """An image as `Processor` gives it."""
    return np.random.default_rng(seed).standard_normal((height, width, 3)).astype(np.float32)


def test_squares_are_a_case_of_any_size(weights, built):
    """What the compiled step makes of a batch of squares is what the host makes of them; a family takes either."""
    config = tiny.config(weights)
    model, ids = built.modules.captioner, built.prompts.caption
    images = tiny.scenes(2).astype(np.float32) / 255
    pixels = (images - inputs.IMAGE_MEAN) / inputs.IMAGE_STD
    rows = [(ids, [x]) for x in pixels]
    one, other = alike(ids, images, model.config), batch(rows, needed(rows, model.config), model.config)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.broadcast_to(a, b.shape), b, atol=1e-5)
    family, keys = built.family(config), step.sample_keys(jax.random.key(0), jnp.int32(0), 2, 3)

    @jax.jit
    def both(frozen, images):
        captions = family.generate(STARTING_WEIGHTS, frozen, images, keys)
        return captions, family.log_probs(STARTING_WEIGHTS, frozen, images, {"caption": captions})["caption"]

    (first, scored), (second, again) = (both(built.frozen, x) for x in (jnp.asarray(images), other))
    np.testing.assert_array_equal(first.actions, second.actions)
    np.testing.assert_allclose(scored, again, atol=1e-5)
    np.testing.assert_allclose(scored, first.log_probs, atol=1e-4)


def test_answers_do_not_depend_on_the_batch_they_ride_in(built):
    """Alone and tight, or beside longer prompts and larger images: the same tokens of the same seeds."""
    model, c = built.modules.captioner, built.modules.captioner.config
    image = [c.vision_start_token_id, c.image_token_id, c.vision_end_token_id]
    rows = [
        ([1, *image, 9, 10], [normalised(32, 48)]),
        ([1, 11, 12, 13], []),
        ([1, *image, 8, *image, 20, 21, 22], [normalised(16, 16, 1), normalised(48, 80, 2)]),
    ]
    seeds = tokens.seeded(np.arange(6).reshape(3, 2))
    sampling = Sampling(8, (built.prompts.end_token,), 1.0, top_k=12, top_p=0.95)

    @jax.jit
    def write(prompt, keys):
        return caption.generate(model, built.frozen["start"], prompt, keys, allowed=built.allowed, sampling=sampling)

    together = write(batch(rows, needed(rows, c), c), seeds)
    for i, row in enumerate(rows):
        alone = write(batch([row], needed([row], c), c), seeds[i : i + 1])
        np.testing.assert_array_equal(alone.actions[0], together.actions[i])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[i], atol=1e-4)
    assert len(np.unique(together.actions.reshape(6, -1), axis=0)) > 3
    allowed = np.asarray(built.allowed)
    assert allowed[np.asarray(together.actions)[np.asarray(together.mask)]].all() and not allowed[c.image_token_id]


def test_budget(built):
    """The least that holds all prompts, and what is said when there is less."""
    c = built.modules.captioner.config
    rows = [([1, c.image_token_id], [normalised(32, 48)]), ([1, *range(7, 14)], [])]
    budget = needed(rows, c)
    assert budget == Budget(8, 6, 6)
    prompt = batch(rows, budget, c)
    assert prompt.tokens.shape == (2, 8) and prompt.patches.shape[:2] == (2, 6)
    assert batch(rows[1:], needed(rows[1:], c), c).patches is None
    with pytest.raises(UserError, match="prompt 1 has 8 tokens, its images included; the budget is 7"):
        batch(rows, budget._replace(tokens=7), c)
    with pytest.raises(UserError, match="need 6 windows"):
        batch(rows, budget._replace(windows=5), c)
    with pytest.raises(UserError, match="1 image placeholders for 2 images"):
        expand([1, c.image_token_id], [(2, 2), (2, 2)], c)


def test_processor_refuses_what_it_does_not_do():
    assert Processor.from_hf({}) == Processor()
    for values in ({"do_resize": False}, {"do_normalize": False}, {"resample": 2}):
        with pytest.raises(UserError, match=next(iter(values))):
            Processor.from_hf(values)
