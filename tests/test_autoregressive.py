"""The autoregressive family on a tiny random system: words and image tokens, sampler against scorer, and the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.test_step import family_of, images, keys, make
from uae_jax import grpo, sharding, step, system
from uae_jax.errors import UserError
from uae_jax.sampling.tokens import Segment
from uae_jax.step import STARTING_WEIGHTS
from uae_jax.umm import autoregressive, learnt

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


@pytest.mark.parametrize("guidance,temperature", [(1.0, 0.7), (3.0, 1.0)])
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
    scored = family_of(config_of(**changes), built).log_probs(STARTING_WEIGHTS, built.frozen, images(2), trajectory)
    for name, segment in trajectory.items():
        np.testing.assert_allclose(scored[name], segment.log_probs, rtol=0, atol=1e-4)
    # Not flat, so that another distribution, or a shift by one, would show.
    assert np.asarray(scored["image"]).std() > 0.1
    shifted = trajectory["image"]._replace(actions=jnp.roll(trajectory["image"].actions, 1, axis=-1))
    for changed, segments in (
        (changes | {"redraw__guidance": guidance + 1.0}, trajectory),
        (changes | {"redraw__temperature": temperature + 0.3}, trajectory),
        (changes, trajectory | {"image": shifted}),
    ):
        other = family_of(config_of(**changed), built)
        wrong = other.log_probs(STARTING_WEIGHTS, built.frozen, images(2), segments)["image"]
        assert np.abs(wrong - trajectory["image"].log_probs).max() > 1e-2


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
    family = built.family(config_of(redraw__guidance=2.0, redraw__same_noise=False))
    captions, redrawn, trajectory = rollout(family, built.frozen, 2, 3)

    @jax.jit
    def alone(frozen, captions, images, keys):
        return family.redraw(STARTING_WEIGHTS, frozen, captions, images, keys)

    one = jax.tree.map(lambda x: x[1:, 1:2], captions)
    again, drawn = alone(built.frozen, one, images(2)[1:], keys(2, 3)[1:, 1:2])
    np.testing.assert_array_equal(drawn["image"].actions, trajectory["image"].actions[1:, 1:2])
    np.testing.assert_allclose(again, redrawn[1:, 1:2], atol=1e-4)
    assert (trajectory["image"].actions[1, 0] != trajectory["image"].actions[1, 1]).any()


def test_the_same_noise_draws_the_same_caption_alike(config_of, built):
    captions, *_ = rollout(built.family(config_of()), built.frozen, 1, 3)
    equal = jax.tree.map(lambda x: jnp.broadcast_to(x[:, :1], x.shape), captions)
    for same in (True, False):
        family = family_of(config_of(redraw__same_noise=same), built)
        actions = family.redraw(STARTING_WEIGHTS, built.frozen, equal, images(1), keys(1, 3))[1]["image"].actions
        assert (np.asarray(actions[0, 0]) == np.asarray(actions[0, 1])).all() == same


def test_text_is_the_only_channel(config_of, built):
    """What is after the end token, or in the picture, is not drawn; what the caption says is."""
    family = family_of(config_of(), built)
    actions = np.full((1, 1, 8), 9, np.int32)
    actions[..., 3] = built.prompts.end_token
    mask = np.arange(8) <= np.full((1, 1, 1), 3)

    def drawn(actions, seed=0):
        segment = Segment(jnp.asarray(actions), jnp.asarray(mask), jnp.zeros(mask.shape))
        return np.asarray(family.redraw(STARTING_WEIGHTS, built.frozen, segment, images(1, seed), keys(1, 1))[0])

    garbage, other = actions.copy(), actions.copy()
    garbage[..., 4:], other[..., 1] = 12, 12
    np.testing.assert_array_equal(drawn(actions), drawn(garbage))
    np.testing.assert_array_equal(drawn(actions), drawn(actions, seed=5))
    assert (drawn(actions) != drawn(other)).any()


def test_who_draws(config_of, built):
    """Frozen weights unless they are live."""
    trained = {"encoder": jax.tree.map(lambda x: x * 1.1, system.trainable(built.frozen["start"], "language/.*"))}
    captions, *_ = rollout(built.family(config_of()), built.frozen, 1, 2)
    for encoder, moves in (("frozen", False), ("live", True)):
        family = family_of(config_of(text_encoder=encoder), built)
        before, after = (
            np.asarray(family.redraw(p, built.frozen, captions, images(1), keys(1, 2))[1]["image"].log_probs)
            for p in (STARTING_WEIGHTS, trained)
        )
        assert (before != after).any() == moves


@pytest.mark.parametrize(
    "changes,names",
    [({}, ["caption"]), (BOTH, ["caption", "image"]), (BOTH | {"train": "decoder"}, ["image"])],
)
def test_step_learns_from_what_config_train_says(config_of, built, changes, names):
    config = config_of(rl__inner_epochs=2, rl__microbatches=2, redraw__guidance=2.0, **changes)
    state, function = make(config, built)
    batch = {"image": jnp.asarray(tiny.scenes(2))}
    after, metrics = jax.jit(function)(state, built.frozen, batch)
    assert sorted(k.rsplit("/")[-1] for k in metrics if k.startswith("ratio/max_abs_dev_first/")) == names
    for name in names:
        assert metrics[f"ratio/max_abs_dev_first/{name}"] < 1e-4
        assert metrics[f"kl/{name}"] > 0  # of the second epoch
    assert metrics["logp/sampler_gap"] < 1e-4 and metrics["bad_steps"] == 0
    assert metrics["update_norm/encoder"] > 0
    assert (metrics["update_norm/decoder"] > 0) == ("image" in names)
    assert set(after.params["encoder"]) == {"language"}  # and nothing else, by default


def test_image_tokens_do_not_outweigh_the_caption(config_of, built):
    """Each segment is a mean over its own actions: 36 image tokens weigh as much as 8 words, and as config says."""
    mask = {"caption": jnp.ones((2, 3, 8), bool), "image": jnp.ones((2, 3, 576), bool)}
    for normaliser in ("constant", "sequence", "token"):
        sums = {name: float(grpo.action_weights(m, normaliser).sum()) for name, m in mask.items()}
        assert sums["caption"] == pytest.approx(1.0, rel=1e-5) and sums["image"] == pytest.approx(1.0, rel=1e-4)
    norms = {}
    for caption, image in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.0)):
        config = config_of(rl__weights__caption=caption, rl__weights__image=image, rl__beta=0.0, **BOTH)
        state, function = make(config, built)
        _, metrics = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})
        norms[caption, image] = float(metrics["grad_norm"])
    assert min(norms.values()) > 0
    assert norms[0.5, 0.0] == pytest.approx(norms[1.0, 0.0] / 2, rel=1e-3)


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
        ({"prompt__redraw_suffix": "<|im_end|>"}, "prompt.redraw_suffix"),
    ],
)
def test_what_it_cannot_do_is_refused(config_of, weights, janus, changes, message):
    suffix = changes.pop("prompt__redraw_suffix", None) if "prompt__redraw_suffix" in changes else None
    config = config_of(**changes)
    if suffix:
        config.prompt.redraw_suffix = suffix
    with pytest.raises(UserError, match=message):
        system.load(config, sharding.make_mesh(config)).family(config)


def test_keys_of_a_step_serve_both_segments(config_of, built):
    """Words and image tokens of one sample have keys of their own: the same seed, and no correlation."""
    config = config_of(**BOTH)
    state, function = make(config, built)
    first = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})[1]
    second = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})[1]
    assert {k: float(v) for k, v in first.items()} == {k: float(v) for k, v in second.items()}
    assert step.sample_keys(state.key, state.step, 2, 4).shape == (2, 4)
