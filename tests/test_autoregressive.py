"""The autoregressive family on a tiny random system: words and image tokens, sampler against scorer, and the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from tests.test_step import family_of, images, keys, make
from uae_jax import sharding, step, system
from uae_jax.errors import UserError
from uae_jax.sampling.tokens import Segment
from uae_jax.step import STARTING_WEIGHTS, State
from uae_jax.umm import Family, autoregressive, learnt

BOTH = {"train": "both", "text_encoder": "live", "redraw__same_noise": False}


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    return tiny.write_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def built(janus, weights):
    config = tiny.ar_config(janus, weights)
    return system.load(config, sharding.make_mesh(config))


@pytest.fixture(scope="module")
def config_of(janus, weights):
    return lambda **changes: tiny.ar_config(janus, weights, **changes)


def rollout(family, frozen, b, g, params=STARTING_WEIGHTS, seed=0):
    """Captions, their images, and the trajectory of both."""

    @jax.jit
    def run(frozen, images, keys):
        captions = family.generate(params, frozen, images, keys)
        redrawn, drawn = family.redraw(params, frozen, captions, images, keys)
        return captions, redrawn, {"caption": captions} | drawn

    return run(frozen, images(b, seed), keys(b, g))


def spoken(b, g, ids, t=8):
    """The same caption for all of a batch."""
    actions = np.zeros((b, g, t), np.int32)
    actions[..., : len(ids)] = ids
    mask = np.broadcast_to(np.arange(t) < len(ids), actions.shape)
    return Segment(jnp.asarray(actions), jnp.asarray(mask), jnp.zeros(actions.shape))


@pytest.mark.parametrize("guidance,temperature", [(1.0, 0.7), (2.0, 1.0)])
def test_sampler_and_scorer_agree_for_words_and_image_tokens(config_of, built, guidance, temperature):
    changes = {
        "redraw__guidance": guidance, "redraw__temperature": temperature, "rl__logit_chunk": 5, "rl__max_tokens": 16,
    }  # fmt: skip
    family = built.family(config_of(**changes))
    _, redrawn, trajectory = rollout(family, built.frozen, 2, 4)
    assert redrawn.shape == (2, 4, 48, 48, 3) and redrawn.min() >= 0 and redrawn.max() <= 1
    assert trajectory["image"].actions.shape == (2, 4, 36) and trajectory["image"].mask.all()
    assert len(np.unique(trajectory["image"].actions)) > 10
    assert len(set(np.asarray(trajectory["caption"].mask.sum(-1)).ravel())) > 1  # captions of several lengths
    score = family_of(config_of(**changes), built).log_probs
    scored = score(STARTING_WEIGHTS, built.frozen, images(2), trajectory)
    for name, segment in trajectory.items():
        np.testing.assert_allclose(scored[name], segment.log_probs, rtol=0, atol=1e-4)
    # Not flat, so that a shift by one, or another distribution, would show.
    shifted = trajectory["image"]._replace(actions=jnp.roll(trajectory["image"].actions, 1, axis=-1))
    other = family_of(config_of(**changes | {"redraw__guidance": guidance + 0.5}), built).log_probs
    for wrong in (
        score(STARTING_WEIGHTS, built.frozen, images(2), trajectory | {"image": shifted}),
        other(STARTING_WEIGHTS, built.frozen, images(2), trajectory),
    ):
        assert np.abs(wrong["image"] - trajectory["image"].log_probs).max() > 1e-2


def test_prompts_for_images_are_right_aligned_and_hide_all_but_their_ends():
    prompts = autoregressive.Prompts((1, 5), (1, 8), (9, 3), (), 2)
    captions, length = jnp.array([[20, 21, 22], [23, 2, 0]]), jnp.array([3, 1])
    prompt = autoregressive.drawing(captions, length, prompts, pad=0)
    assert prompt.tokens[0].tolist() == [1, 8, 20, 21, 22, 9, 3]
    assert prompt.tokens[1, 2:].tolist() == [1, 8, 23, 9, 3]
    assert prompt.mask.tolist() == [[True] * 7, [False] * 2 + [True] * 5]
    assert prompt.positions[1].tolist() == [0, 0, 0, 1, 2, 3, 4] and prompt.following.tolist() == [7, 5]
    blank = autoregressive.unconditional(prompt, pad=0)
    assert blank.tokens[0].tolist() == [1, 0, 0, 0, 0, 0, 3]
    assert blank.tokens[1, 2:].tolist() == [1, 0, 0, 0, 3]
    assert (blank.mask == prompt.mask).all()  # padding is attended to, as many tokens as the caption has


def test_samples_are_independent_of_their_neighbours(config_of, built):
    changes = {"redraw__guidance": 2.0, "redraw__same_noise": False}
    family = built.family(config_of(**changes, redraw__slice_vae=True))
    captions, redrawn, trajectory = rollout(family, built.frozen, 2, 3)
    family = built.family(config_of(**changes))

    @jax.jit
    def alone(frozen, captions, images, keys):
        return family.redraw(STARTING_WEIGHTS, frozen, captions, images, keys)

    one = jax.tree.map(lambda x: x[1:, 1:2], captions)
    again, drawn = alone(built.frozen, one, images(2)[1:], keys(2, 3)[1:, 1:2])
    np.testing.assert_array_equal(drawn["image"].actions, trajectory["image"].actions[1:, 1:2])
    np.testing.assert_allclose(again, redrawn[1:, 1:2], atol=1e-4)
    assert (trajectory["image"].actions[1, 0] != trajectory["image"].actions[1, 1]).any()


def test_the_same_noise_draws_the_same_caption_alike(config_of, built):
    equal = spoken(1, 3, [9, 2])
    for same in (True, False):
        family = family_of(config_of(redraw__same_noise=same), built)
        actions = family.redraw(STARTING_WEIGHTS, built.frozen, equal, images(1), keys(1, 3))[1]["image"].actions
        assert (np.asarray(actions[0, 0]) == np.asarray(actions[0, 1])).all() == same


def test_text_is_the_only_channel(config_of, built):
    """What is after the end token, or in the picture, is not drawn; what the caption says is."""
    family = family_of(config_of(), built)

    def drawn(captions, seed=0):
        return np.asarray(family.redraw(STARTING_WEIGHTS, built.frozen, captions, images(1, seed), keys(1, 1))[0])

    captions, other = spoken(1, 1, [9, 9, 9, 2]), spoken(1, 1, [9, 12, 9, 2])
    garbage = captions._replace(actions=jnp.where(captions.mask, captions.actions, 12))
    np.testing.assert_array_equal(drawn(captions), drawn(garbage))
    np.testing.assert_array_equal(drawn(captions), drawn(captions, seed=5))
    assert (drawn(captions) != drawn(other)).any()


def test_who_draws(config_of, built):
    """Frozen weights unless they are live."""
    trained = {"encoder": jax.tree.map(lambda x: x * 1.1, system.trainable(built.frozen["start"], "language/.*"))}
    captions = spoken(1, 2, [9, 12, 2])
    for encoder, moves in (("frozen", False), ("live", True)):
        family = family_of(config_of(text_encoder=encoder), built)
        before, after = (
            np.asarray(family.redraw(p, built.frozen, captions, images(1), keys(1, 2))[1]["image"].log_probs)
            for p in (STARTING_WEIGHTS, trained)
        )
        assert (before != after).any() == moves


def test_a_step_learns_from_both_segments(config_of, built):
    config = config_of(rl__inner_epochs=2, rl__microbatches=2, redraw__guidance=2.0, **BOTH)
    state, function = make(config, built)
    after, metrics = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})
    for name in ("caption", "image"):
        assert metrics[f"ratio/max_abs_dev_first/{name}"] < 1e-4  # the ratio is 1 at the first inner step
        assert metrics[f"kl/{name}"] > 0  # and not at the second
    assert metrics["logp/sampler_gap"] < 1e-4 and metrics["bad_steps"] == 0
    assert metrics["update_norm/encoder"] > 0 and metrics["update_norm/decoder"] > 0
    assert set(after.params["encoder"]) == {"language"}  # and nothing else, by default


@pytest.mark.parametrize("changes,name", [({}, "caption"), (BOTH | {"train": "decoder"}, "image")])
def test_a_step_learns_from_what_config_train_says(config_of, built, changes, name):
    state, function = make(config_of(**changes), built)
    metrics = jax.eval_shape(function, state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})[1]
    assert [k for k in metrics if k.startswith("kl/")] == [f"kl/{name}"]


@pytest.mark.parametrize("normaliser", ["constant", "sequence", "token"])
@pytest.mark.parametrize("train", ["both", "encoder", "decoder"])
def test_many_image_tokens_do_not_outweigh_a_caption(config_of, normaliser, train):
    """Gradients of a policy whose tokens all have the same slope: each segment counts once, as config says."""
    shapes = {"caption": (1, 2, 8), "image": (1, 2, 576)}
    caption, image = 0.5, 2.0
    config = config_of(
        rl__weights__caption=caption, rl__weights__image=image, rl__normaliser=normaliser, rl__beta=0.0,
        **BOTH | {"train": train},
    )  # fmt: skip
    slope = jnp.array([1.0, 0.0])[None, :, None]  # the second sample's advantage is the first's, negated
    family = Family(
        lambda *_: None,
        lambda *_: None,
        lambda params, frozen, images, trajectory: {
            k: slope * params["encoder"][k] + jnp.zeros(x) for k, x in shapes.items()
        },
    )
    params = {"encoder": {name: jnp.float32(0) for name in shapes}}
    optimizer = optax.sgd(1.0)
    state = State(jnp.int32(0), jax.random.key(0), params, optimizer.init(params), jnp.int32(0))
    trajectory = {k: Segment(jnp.zeros(x, int), jnp.ones(x, bool), jnp.zeros(x)) for k, x in shapes.items()}
    after, _ = step.update(
        state, {}, jnp.zeros((1, 4, 4, 3)), trajectory, jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool),
        family=family, optimizer=optimizer, config=config,
    )  # fmt: skip
    moved = {name: float(x) for name, x in after.params["encoder"].items()}
    expected = {"caption": caption / 2, "image": image / 2}  # one of two samples has a slope
    for name in shapes:
        wanted = expected[name] if name in learnt(shapes, train) else 0.0
        assert moved[name] == pytest.approx(wanted, rel=1e-4)


def test_what_is_learnt():
    names = ("caption", "image")
    assert learnt(names, "encoder") == ("caption",)
    assert learnt(names, "decoder") == ("image",)
    assert learnt(names, "both") == names


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"train": "both"}, "text_encoder=live"),
        (BOTH | {"redraw__same_noise": True}, "same_noise=False"),
        (BOTH | {"redraw__temperature": 0.0}, "redraw.temperature above 0"),
        ({"condition_source": "in_context"}, "condition_source"),
        ({"data__image_size": 40}, "data.image_size = 40"),
    ],
)
def test_what_it_cannot_do_is_refused(config_of, built, changes, message):
    with pytest.raises(UserError, match=message):
        built.family(config_of(**changes))


def test_a_prompt_that_does_not_ask_for_an_image_is_refused(config_of, built):
    prompts = dataclasses.replace(built.prompts, redraw_suffix=(built.prompts.end_token,))
    with pytest.raises(UserError, match=r"prompt.redraw_suffix"):
        autoregressive.build(built.modules, prompts, built.allowed, config_of())
