"""The compiled step of Unified-GRPO: rollout, redraw, score, update, in one program.

    step(state, frozen, batch) -> state, metrics

Four pure functions, composed here and compiled by one `jax.jit` with a donated state. Nothing leaves the device inside.
Keys come from `fold_in(state.key, step, image, sample)`: a sample does not depend on its neighbours, and a resumed run
draws what the uninterrupted one would have drawn.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from uae_jax import grpo, rewards, sharding
from uae_jax.sampling import tokens
from uae_jax.umm import Family, Params, Trajectory, learnt

Metrics = dict[str, jax.Array]

# `params` in which nothing has been trained: the family then uses the weights that the run began with.
STARTING_WEIGHTS: Params = {"encoder": {}}


class State(struct.PyTreeNode):
    """All that a run changes, and all that a checkpoint holds."""

    step: jax.Array  # int32, updates done
    key: jax.Array  # typed PRNG key of the run; never split, only folded into
    params: Params  # float32, what is trained
    opt_state: optax.OptState
    bad_steps: jax.Array  # int32, updates left out because a gradient was not finite
    ema: Params = None  # float32 like params, their moving average; None where a stage keeps none


class Scores(NamedTuple):
    """What the reward sees of a rollout. Axes b(atch) g(roup)."""

    reward: jax.Array  # [b, g]
    valid: jax.Array  # bool [b, g]; False: no gradient from this sample
    towers: dict[str, jax.Array]  # cosine of every tower, monitors included [b, g]
    truncated: jax.Array  # bool [b, g]
    malformed: jax.Array  # bool [b, g]
    non_finite: jax.Array  # bool [b, g]


def sample_keys(key: jax.Array, step: jax.Array, images: int, group: int) -> jax.Array:
    """One key a sample [b, g], from the run's key, the step, the image's place in the global batch, the sample's."""

    def at(image: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, step), image), sample)

    return jax.vmap(lambda image: jax.vmap(lambda sample: at(image, sample))(jnp.arange(group)))(jnp.arange(images))


def score(
    images: jax.Array,
    redrawn: jax.Array,
    trajectory: Trajectory,
    frozen: Params,
    *,
    towers: rewards.Towers,
    config: Any,
    end_token: int,
    automaton: rewards.Automaton | None,
) -> Scores:
    """Rewards of a rollout, and which samples count."""
    captions = trajectory["caption"]
    values = rewards.similarities(towers, frozen["towers"], images, redrawn)
    length = tokens.content_lengths(captions, end_token)
    of_text = rewards.of_text(config.reward, captions.actions, length, config.rl.token_budget, automaton)
    reward = rewards.weighted_sum(values | of_text, config.reward)
    non_finite = ~jnp.isfinite(reward)
    truncated = tokens.truncated(captions, end_token)
    if automaton is None:
        malformed = jnp.zeros_like(truncated)
    else:
        malformed = ~rewards.well_formed(captions.actions, length, automaton)
    valid = ~non_finite
    if config.rl.truncated == "mask":
        valid &= ~truncated
    elif config.rl.truncated == "zero":
        reward = jnp.where(truncated & valid, 0.0, reward)
    if config.rl.malformed == "zero":
        reward = jnp.where(malformed & valid, 0.0, reward)
    elif config.rl.malformed == "group_min":
        lowest = jnp.where(valid, reward, jnp.inf).min(-1, keepdims=True)
        reward = jnp.where(malformed & valid, lowest, reward)
    return Scores(reward, valid, values, truncated, malformed, non_finite)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the entries of `mask`; 0 if there are none. Entries outside may be NaN."""
    return jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def update(
    state: State,
    frozen: Params,
    images: jax.Array,
    trajectory: Trajectory,
    advantage: jax.Array,
    valid: jax.Array,
    *,
    family: Family,
    optimizer: optax.GradientTransformation,
    config: Any,
) -> tuple[State, Metrics]:
    """`inner_epochs` updates on one rollout, each over all microbatches.

    Old log-probs are the scorer's own at the start, so the ratio of the first epoch is 1 by construction; what can go
    wrong is the gap to the sampler's, which is measured (`logp/sampler_gap`).

    Each segment that is learnt from (`config.train`) is normalised by its own actions and weighted by
    `config.rl.weights`, so that many image tokens do not drown a short caption.
    """
    rl = config.rl
    names = learnt(trajectory, config.train)
    segments = {name: s._replace(mask=s.mask & valid[..., None]) for name, s in trajectory.items()}
    weights = {name: rl.weights[name] * grpo.action_weights(segments[name].mask, rl.normaliser) for name in names}
    counts = {name: jnp.maximum(segments[name].mask.sum(), 1) for name in names}

    parts = sharding.split_parts((images, segments, weights, advantage), rl.microbatches)

    def scored(params: Params, part: Any) -> dict[str, jax.Array]:
        # What is not learnt from is left out here; the compiler drops its part of the scorer.
        scores = family.log_probs(params, frozen, part[0], part[1])
        return {name: scores[name] for name in names}

    def before(part: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Log-probs by the weights before the update and before the run; largest gap of the first to the sampler's."""
        old = scored(state.params, part)
        ref = scored(STARTING_WEIGHTS, part) if rl.beta else old
        gaps = {name: jnp.where(part[1][name].mask, old[name] - part[1][name].log_probs, 0.0) for name in names}
        return old, ref, {k: jnp.stack([jnp.abs(g).max(), jnp.abs(jnp.expm1(g)).max()]) for k, g in gaps.items()}

    old, ref, gaps = jax.lax.map(before, parts)

    def objective(params: Params, part: Any, old: Any, ref: Any) -> tuple[jax.Array, dict[str, grpo.Loss]]:
        _, _, weights, advantage = part
        new = scored(params, part)
        clip = {"clip_low": rl.clip_low, "clip_high": rl.clip_high, "beta": rl.beta}
        losses = {name: grpo.loss(new[name], old[name], ref[name], advantage, weights[name], **clip) for name in names}
        return sum((x.loss for x in losses.values()), start=jnp.float32(0)), losses

    def epoch(state: State, _: None) -> tuple[State, tuple[dict[str, grpo.Loss], jax.Array, jax.Array]]:
        def accumulate(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(objective, has_aux=True)(state.params, *xs)), None

        zeros = (jax.tree.map(jnp.zeros_like, state.params), {name: grpo.Loss(*[jnp.float32(0)] * 3) for name in names})
        (gradient, total), _ = jax.lax.scan(accumulate, zeros, (parts, old, ref))
        state, norm, moved = apply_gradient(state, gradient, optimizer)
        return state, (total, norm, moved)

    state, (losses, norm, moved) = jax.lax.scan(epoch, state, None, length=rl.inner_epochs)
    gap = jnp.stack([gaps[name].max(0) for name in names])
    actions = sum(counts.values())
    whole = jax.tree.map(lambda *parts: sum(parts), *losses.values())
    metrics = {
        "loss": whole.loss[-1],
        "kl": whole.kl[-1] / actions,
        "ratio/clip_fraction": whole.clipped.mean() / actions,
        "logp/sampler_gap": gap[:, 0].max(),
        "ratio/max_abs_dev_first": gap[:, 1].max(),
        "grad_norm": norm[-1],
        # A family of one model has one tree of parameters; its decoder moves where image tokens are learnt from.
        "update_norm/encoder": moved.sum(),
        "update_norm/decoder": jnp.where(config.train == "encoder", 0.0, moved.sum()),
    }
    for i, (name, loss) in enumerate(losses.items()):
        metrics |= {f"kl/{name}": loss.kl[-1] / counts[name], f"ratio/max_abs_dev_first/{name}": gap[i, 1]}
        metrics[f"ratio/clip_fraction/{name}"] = loss.clipped.mean() / counts[name]
    return state, metrics


def apply_gradient(
    state: State, gradient: Params, optimizer: optax.GradientTransformation
) -> tuple[State, jax.Array, jax.Array]:
    """One optax update, left out (and counted) if the gradient is not finite; with the norms of gradient and change."""
    norm = optax.global_norm(gradient)
    ok = jnp.isfinite(norm)
    changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    changes = jax.tree.map(lambda x: jnp.where(ok, x, 0.0), changes)
    state = state.replace(
        params=optax.apply_updates(state.params, changes),
        opt_state=jax.tree.map(lambda new, old: jnp.where(ok, new, old), opt_state, state.opt_state),
        bad_steps=state.bad_steps + ~ok,
    )
    return state, norm, optax.global_norm(changes)


def make_step(
    config: Any,
    family: Family,
    towers: rewards.Towers,
    optimizer: optax.GradientTransformation,
    *,
    end_token: int,
    automaton: rewards.Automaton | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[State, Params, dict[str, jax.Array]], tuple[State, Metrics]]:
    """The step as a pure function, to be compiled with `jax.jit(step, donate_argnums=0)`.

    `batch` is {"image": uint8 [b, H, W, 3]}.
    """

    def step(state: State, frozen: Params, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        images = sharding.constrain_batch(batch["image"], mesh).astype(jnp.float32) / 255.0
        keys = sample_keys(state.key, state.step, images.shape[0], config.rl.group_size)
        sampling_keys, noise_keys = (tokens.map_keys(lambda k, i=i: jax.random.fold_in(k, i), keys) for i in range(2))

        def rollout(part: tuple[jax.Array, ...]) -> tuple[Trajectory, Scores]:
            images, sampling_keys, noise_keys = part
            images = sharding.constrain_batch(images, mesh)
            captions = family.generate(state.params, frozen, images, sampling_keys)
            redrawn, drawn = family.redraw(state.params, frozen, captions, images, noise_keys)
            trajectory = {"caption": captions} | drawn
            scores = score(
                images, redrawn, trajectory, frozen,
                towers=towers, config=config, end_token=end_token, automaton=automaton,
            )  # fmt: skip
            return trajectory, scores

        trajectory, scores = sharding.in_parts(
            rollout, (images, sampling_keys, noise_keys), config.rl.rollout_microbatches
        )
        trajectory = sharding.constrain_batch(trajectory, mesh, group=True)
        advantage, flat = grpo.advantages(
            scores.reward, scores.valid, eps=config.rl.advantage_eps, scale_by_std=config.rl.scale_by_std
        )
        state, metrics = update(
            state, frozen, images, trajectory, advantage, scores.valid,
            family=family, optimizer=optimizer, config=config,
        )  # fmt: skip
        finite = ~scores.non_finite
        centred = scores.reward - jnp.where(finite, scores.reward, 0).sum(-1, keepdims=True) / jnp.maximum(
            finite.sum(-1, keepdims=True), 1
        )
        mean = masked_mean(scores.reward, finite)
        length = tokens.lengths(trajectory["caption"])
        metrics |= {
            "reward/mean": mean,
            "reward/std": jnp.sqrt(masked_mean((scores.reward - mean) ** 2, finite)),
            "reward/group_std": jnp.sqrt(masked_mean(centred**2, finite)),
            "reward/non_finite": scores.non_finite.sum(),
            "caption/length": length.mean(),
            "caption/tokens": length.sum(),
            "caption/truncated": scores.truncated.mean(),
            "caption/malformed": scores.malformed.mean(),
            "advantage/zero_groups": flat.mean(),
            "bad_steps": state.bad_steps,
        } | {f"tower/{name}": masked_mean(value, jnp.isfinite(value)) for name, value in scores.towers.items()}
        return state.replace(step=state.step + 1), metrics

    return step
