"""The compiled step on a tiny random system: sampler against scorer, caches, masks, leaks, determinism."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from uae_jax import rewards, sharding, step, system
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl import inputs
from uae_jax.models.qwen2_5_vl.prompts import expand
from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Segment
from uae_jax.stages import rl
from uae_jax.step import STARTING_WEIGHTS
from uae_jax.umm import Family


@pytest.fixture(scope="module")
def built(weights):
    config = tiny.config(weights)
    return system.load(config, sharding.make_mesh(config))


def images(n, seed=0):
    return jnp.asarray(tiny.scenes(n, seed), jnp.float32) / 255.0


def keys(b, g, seed=0):
    return step.sample_keys(jax.random.key(seed), jnp.int32(0), b, g)


def family_of(config, built, **options):
    """The family's functions, each compiled as one program."""
    return Family(*map(jax.jit, built.family(config, **options)))


def make(config, built, mesh=None, towers=None):
    """State and step function of a config."""
    state, optimizer = rl.start(config, built)
    function = step.make_step(
        config,
        built.family(config, mesh),
        towers or built.towers,
        optimizer,
        end_token=built.prompts.end_token,
        automaton=built.automaton,
        mesh=mesh,
    )
    return state, function


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_scorer_agree_for_every_token(weights, built, temperature):
    config = tiny.config(weights, rl__temperature=temperature, rl__max_tokens=12, rl__logit_chunk=5)
    family = built.family(config)

    @jax.jit
    def both(frozen, images, keys):
        captions = family.generate(STARTING_WEIGHTS, frozen, images, keys)
        return captions, family.log_probs(STARTING_WEIGHTS, frozen, images, {"caption": captions})["caption"]

    captions, scored = both(built.frozen, images(3), keys(3, 4))
    assert captions.mask.sum() > 40
    assert len(np.unique(np.asarray(captions.actions)[np.asarray(captions.mask)])) > 5
    np.testing.assert_allclose(scored, captions.log_probs, rtol=0, atol=1e-4)
    # The distribution is not flat, so a wrong temperature or mask would show.
    assert np.asarray(captions.log_probs)[np.asarray(captions.mask)].std() > 0.1
    other = family_of(tiny.config(weights, rl__temperature=temperature + 0.3, rl__max_tokens=12), built)
    wrong = other.log_probs(STARTING_WEIGHTS, built.frozen, images(3), {"caption": captions})["caption"]
    assert np.abs(wrong - captions.log_probs).max() > 1e-2


def greedy_without_cache(built, image, max_tokens):
    """Greedy decoding that reads the whole sequence again for every token."""
    captioner, prompts, weights = built.modules.captioner, built.prompts, built.frozen["start"]
    vision = captioner.config.vision
    layout, _ = inputs.layout(48, 48, vision)
    grid = (48 // vision.patch_size,) * 2
    prompt = expand(prompts.caption, [grid], captioner.config)
    p = len(prompt)
    call = lambda *args, method: captioner.apply({"params": weights}, *args, method=method)  # noqa: E731

    @jax.jit
    def logits(ids, length):
        pixels = (image - inputs.IMAGE_MEAN) / inputs.IMAGE_STD
        features = call(inputs.patchify(pixels, vision), layout, method="encode_image")
        embeds = call(ids, features, method="embed")
        # Causal, so what stands after `length` does not matter.
        causal = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        hidden, _ = call(embeds, jnp.asarray(positions), causal, method="hidden")
        return call(hidden[length - 1], method="logits")

    ids = np.full(p + max_tokens, 9, np.int32)
    ids[:p] = prompt
    positions, _ = inputs.rope_positions(ids, [grid], captioner.config)
    for length in range(p, p + max_tokens):
        ids[length] = np.where(built.allowed, logits(ids, length), -np.inf).argmax()
        if ids[length] == prompts.end_token:
            break
    return ids[p : length + 1].tolist()


def test_cached_sampling_equals_uncached_greedy_decoding(weights, built):
    config = tiny.config(weights)
    family = family_of(config, built, temperature=0.0)
    captions = family.generate(STARTING_WEIGHTS, built.frozen, images(2), keys(2, 2))
    for i, image in enumerate(images(2)):
        expected = greedy_without_cache(built, image, config.rl.max_tokens)
        for sample in range(2):
            got = np.asarray(captions.actions[i, sample])[np.asarray(captions.mask[i, sample])]
            assert got.tolist() == expected


def test_a_sample_does_not_change_with_its_neighbours(weights, built):
    family = family_of(tiny.config(weights), built)
    generate = lambda x, k: family.generate(STARTING_WEIGHTS, built.frozen, x, k)  # noqa: E731
    first = generate(images(2), keys(2, 4))
    mixed = jnp.concatenate([images(1), images(1, seed=9)])
    second = generate(mixed, keys(2, 4))
    np.testing.assert_array_equal(first.actions[0], second.actions[0])
    np.testing.assert_allclose(first.log_probs[0], second.log_probs[0], atol=1e-5)
    assert (first.actions[1] != second.actions[1]).any()
    alone = family.generate(STARTING_WEIGHTS, built.frozen, images(1), keys(2, 4)[:1, :2])
    np.testing.assert_array_equal(first.actions[:1, :2], alone.actions)


def ended_at(length, t=8, end=2, word=9):
    """A caption of `length` words, then the end token, then other tokens that must not count."""
    actions = np.full(t, word, np.int32)
    actions[length] = end
    mask = np.arange(t) <= length
    return actions, mask


def test_nothing_after_the_end_token_counts(weights, built):
    family = family_of(tiny.config(weights), built)
    actions, mask = ended_at(3)
    garbage = actions.copy()
    garbage[4:] = 12

    def outcome(actions):
        segment = Segment(jnp.asarray(actions)[None, None], jnp.asarray(mask)[None, None], jnp.zeros((1, 1, 8)))
        scores = family.log_probs(STARTING_WEIGHTS, built.frozen, images(1), {"caption": segment})["caption"]
        return scores, family.redraw(STARTING_WEIGHTS, built.frozen, segment, images(1), keys(1, 1))[0]

    for one, other in zip(outcome(actions), outcome(garbage), strict=True):
        np.testing.assert_array_equal(one, other)
    assert (outcome(actions)[0][0, 0, 4:] == 0).all()


@pytest.mark.parametrize("source,leaks", [("text", False), ("in_context", True)])
def test_text_is_the_only_channel(weights, built, source, leaks):
    family = family_of(tiny.config(weights, condition_source=source), built)
    captions = family.generate(STARTING_WEIGHTS, built.frozen, images(2), keys(2, 2))
    draw = lambda x: family.redraw(STARTING_WEIGHTS, built.frozen, captions, x, keys(2, 2))[0]  # noqa: E731
    same, swapped = draw(images(2)), draw(images(2, seed=5))
    assert (np.asarray(same) != np.asarray(swapped)).any() == leaks


def test_frozen_text_encoder_ignores_training_and_live_does_not(weights, built):
    trained = {"encoder": jax.tree.map(lambda x: x * 1.1, system.trainable(built.frozen["start"], "language/.*"))}
    captions = family_of(tiny.config(weights), built).generate(STARTING_WEIGHTS, built.frozen, images(1), keys(1, 2))
    for encoder, moves in (("frozen", False), ("live", True)):
        family = family_of(tiny.config(weights, text_encoder=encoder), built)
        before, after = (
            family.redraw(p, built.frozen, captions, images(1), keys(1, 2))[0] for p in (STARTING_WEIGHTS, trained)
        )
        assert (np.asarray(before) != np.asarray(after)).any() == moves


def test_group_shares_its_noise(weights, built):
    actions, mask = ended_at(3)
    segment = Segment(*(jnp.broadcast_to(x, (1, 3, 8)) for x in (actions, mask, np.zeros(8, np.float32))))
    for same in (True, False):
        family = family_of(tiny.config(weights, redraw__same_noise=same), built)
        drawn = np.asarray(family.redraw(STARTING_WEIGHTS, built.frozen, segment, images(1), keys(1, 3))[0])
        assert (np.abs(drawn[0, 0] - drawn[0, 1]).max() < 1e-5) == same


def test_guidance_moves_away_from_the_unconditional_image(weights, built):
    actions, mask = ended_at(3)
    segment = Segment(actions[None, None], jnp.asarray(mask)[None, None], jnp.zeros((1, 1, 8)))
    empty = Segment(*(jnp.broadcast_to(x, (1, 1, 8)) for x in (*ended_at(0), np.zeros(8, np.float32))))

    def drawn(guidance, segment):
        family = family_of(tiny.config(weights, redraw__guidance=guidance, redraw__steps=1), built)
        return family.redraw(STARTING_WEIGHTS, built.frozen, segment, images(1), keys(1, 1))[0]

    conditional, unconditional = drawn(1.0, segment), drawn(1.0, empty)
    # One step from pure noise is linear in the prediction, except where pixels are clipped.
    expected = np.asarray(unconditional + 1.5 * (conditional - unconditional))
    inside = (expected > 0.02) & (expected < 0.98) & (conditional > 0) & (conditional < 1) & (unconditional > 0)
    assert inside.mean() > 0.2
    np.testing.assert_allclose(np.asarray(drawn(1.5, segment))[inside], expected[inside], atol=1e-4)


@pytest.mark.parametrize("train", ["decoder", "both"])
def test_a_decoder_that_samples_nothing_is_not_trained(weights, built, train):
    with pytest.raises(UserError, match=rf"config.train = '{train}'"):
        built.family(tiny.config(weights, train=train))


def test_special_tokens_are_never_written(built):
    forbidden = [i for i in range(7) if i != built.prompts.end_token]
    assert not built.allowed[forbidden].any() and built.allowed[7:].all() and built.allowed[built.prompts.end_token]


def test_one_program_without_callbacks(weights, built):
    config = tiny.config(weights, rl__inner_epochs=2)
    state, function = make(config, built)
    batch = {"image": jnp.asarray(tiny.scenes(2))}
    jaxpr = str(jax.make_jaxpr(function)(state, built.frozen, batch))
    assert not re.search(r"callback|infeed|outfeed|debug_print", jaxpr)
    lowered = jax.jit(function, donate_argnums=0).lower(state, built.frozen, batch)
    text = lowered.as_text()
    assert text.count("func.func public @main") == 1
    assert not re.search(r"callback|infeed|outfeed|SendToHost|RecvFromHost", text)


def test_step_trains_and_repeats_itself(weights, built):
    config = tiny.config(weights, rl__inner_epochs=2, rl__microbatches=2, rl__clip_low=0.02, rl__clip_high=0.02)
    batch = {"image": jnp.asarray(tiny.scenes(2))}

    def run():
        state, function = make(config, built)
        compiled = jax.jit(function)
        lines = []
        for _ in range(3):
            state, metrics = compiled(state, built.frozen, batch)
            lines.append({name: float(value) for name, value in metrics.items()})
        return state, lines

    (state, lines), (_, again) = run(), run()
    assert lines == again
    assert int(state.step) == 3
    for line in lines:
        assert line["ratio/max_abs_dev_first"] < 1e-4 and line["logp/sampler_gap"] < 1e-4
        assert line["reward/group_std"] > 0 and line["update_norm/encoder"] > 0 and line["bad_steps"] == 0
    # Two epochs on one rollout: the second has ratios off 1, and with so narrow a clip some are cut.
    assert max(line["ratio/clip_fraction"] for line in lines) > 0
    assert lines[0]["reward/mean"] != lines[1]["reward/mean"]


def test_microbatches_do_not_change_the_update(weights, built):
    batch = {"image": jnp.asarray(tiny.scenes(4))}
    states = []
    for parts in (1, 2, 4):
        config = tiny.config(weights, data__batch_size=4, rl__microbatches=parts, rl__normaliser="token", rl__beta=0.1)
        state, function = make(config, built)
        state, metrics = jax.jit(function)(state, built.frozen, batch)
        states.append((state.params, {k: float(metrics[k]) for k in ("loss", "kl", "grad_norm")}))
    for params, metrics in states[1:]:
        assert metrics == pytest.approx(states[0][1], rel=1e-4, abs=1e-6)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params, states[0][0])
        # Adam turns rounding of tiny gradients into whole steps, so most and not all entries are compared.
        assert np.median(list(jax.tree.leaves(moved))) < 2e-4


def constant_towers(value):
    """A tower whose features make every cosine `value(images)`."""
    return {"clip": lambda params, images: value(images)}


def test_rollout_microbatches_do_not_change_the_step(weights, built):
    """Images are captioned, redrawn and scored in parts: the same numbers."""
    found = []
    # An untrained decoder's rewards differ by little inside a group: dividing by that would magnify rounding errors.
    changes = {"data__batch_size": 4, "rl__group_size": 2, "rl__scale_by_std": False}
    for parts in (1, 2):
        config = tiny.config(weights, **changes, rl__rollout_microbatches=parts)
        state, function = make(config, built)
        _, metrics = jax.jit(function)(state, built.frozen, {"image": tiny.scenes(4)})
        found.append(jax.device_get(metrics))
    whole, parts = found
    assert whole["caption/tokens"] == parts["caption/tokens"] and whole["reward/std"] > 0
    for name in whole:
        if name.startswith(("logp/", "ratio/max")):  # rounding errors themselves
            assert max(whole[name], parts[name]) < 1e-4
        else:
            np.testing.assert_allclose(parts[name], whole[name], rtol=0, atol=1e-5, err_msg=name)


def test_equal_rewards_give_no_gradient(weights, built):
    towers = constant_towers(lambda x: jnp.ones((*x.shape[:-3], 4)) / 2)
    state, function = make(tiny.config(weights, rl__beta=0.0, monitor=()), built, towers=towers)
    after, metrics = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})
    assert metrics["advantage/zero_groups"] == 1 and metrics["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_nan_rewards_are_masked_and_counted(weights, built):
    """The redraws of one image get NaN; the update must be that of the other image alone."""

    def features(x):
        flat = x.reshape(*x.shape[:-3], -1)[..., :64]
        broken = (jnp.arange(x.shape[0]) == 0).reshape(-1, *[1] * (flat.ndim - 1)) & (flat.ndim == 3)
        return jnp.where(broken, jnp.nan, rewards.unit(flat))

    config = tiny.config(weights, monitor=())
    state, function = make(config, built, towers=constant_towers(features))
    after, metrics = jax.jit(function)(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})
    assert metrics["reward/non_finite"] == config.rl.group_size
    assert all(np.isfinite(float(value)) for value in metrics.values())
    assert metrics["update_norm/encoder"] > 0 and metrics["bad_steps"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


@pytest.mark.parametrize("mode", ["keep", "mask", "zero"])
def test_truncated_captions_are_counted_and_treated(weights, built, mode):
    config = tiny.config(weights, rl__truncated=mode)
    t = config.rl.max_tokens
    actions = np.full((1, 4, t), 9, np.int32)
    actions[0, :2, 3] = built.prompts.end_token
    mask = np.ones((1, 4, t), bool)
    mask[0, :2, 4:] = False
    captions = Segment(jnp.asarray(actions), jnp.asarray(mask), jnp.zeros((1, 4, t)))
    redrawn = jnp.broadcast_to(images(1)[:, None], (1, 4, 48, 48, 3))
    scores = step.score(
        images(1), redrawn, {"caption": captions}, built.frozen,
        towers=built.towers, config=config, end_token=built.prompts.end_token, automaton=None,
    )  # fmt: skip
    assert scores.truncated.tolist() == [[False, False, True, True]]
    assert tokens.truncated(captions, built.prompts.end_token).sum() == 2
    assert scores.valid.tolist() == [[True, True, mode != "mask", mode != "mask"]]
    np.testing.assert_allclose(scores.reward[0, 2:], 0.0 if mode == "zero" else 1.0, atol=1e-5)
    np.testing.assert_allclose(scores.reward[0, :2], 1.0, atol=1e-5)


@pytest.mark.parametrize("mode,expected", [("keep", 0.9), ("group_min", 0.2), ("zero", 0.0)])
def test_malformed_captions_are_punished(weights, built, mode, expected):
    texts = ["a red circle on a black background", "a small blue ring on a gray background", "a a red on background"]
    config = tiny.config(weights, rl__malformed=mode)
    encoded = [[*built.tokenizer.encode(text).ids, 2] for text in texts]
    mask = np.array([np.arange(8) < len(ids) for ids in encoded])
    actions = np.array([(ids + [0] * 8)[:8] for ids in encoded])
    captions = Segment(jnp.asarray(actions)[None], jnp.asarray(mask)[None], jnp.zeros((1, 3, 8)))
    cosines = jnp.array([0.5, 0.2, 0.9])

    def features(x):
        if x.ndim == 4:
            return jnp.broadcast_to(jnp.array([1.0, 0.0]), (1, 2))
        return jnp.stack([cosines, jnp.sqrt(1 - cosines**2)], -1)[None]

    scores = step.score(
        images(1), jnp.zeros((1, 3, 48, 48, 3)), {"caption": captions}, {"towers": {"clip": None}},
        towers=constant_towers(features),
        config=config, end_token=2, automaton=built.automaton,
    )  # fmt: skip
    assert scores.malformed.tolist() == [[False, False, True]]
    np.testing.assert_allclose(scores.reward[0], [0.5, 0.2, expected], atol=1e-6)
