"""The objective of group-relative policy optimisation: pure functions of arrays, no model in sight.

For every image, `g` samples; `A_i = (r_i - mean r) / (std r + eps)` inside the group; per action
`rho = exp(new - old)` and

    J = sum_t w_t ( min(rho A, clip(rho, 1 - low, 1 + high) A) - beta k3 ),    k3 = exp(ref - new) - (ref - new) - 1

(GRPO, arXiv 2402.03300, with the asymmetric clip of DAPO). Everything is float32; log-ratios are clipped to +-20 so
that a wild sample gives a large number and never an infinite one. Axes: b(atch of images) g(roup) t(okens or
other actions).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0


def advantages(
    rewards: jax.Array, valid: jax.Array, *, eps: float = 1e-4, scale_by_std: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Group-relative advantages over the valid samples of every group.

    Args:
      rewards: [b, g]; entries that are not valid may hold anything, NaN included.
      valid: bool [b, g].
      eps: added to the population standard deviation.
      scale_by_std: divide by it (GRPO); False only centres (Dr. GRPO).

    Returns:
      advantages [b, g], 0 where not valid and in groups whose valid rewards are all equal; and bool [b], True for those
      groups.
    """
    rewards = jnp.where(valid, rewards.astype(jnp.float32), 0.0)
    count = jnp.maximum(valid.sum(-1, keepdims=True), 1)
    highest = jnp.where(valid, rewards, -jnp.inf).max(-1)
    lowest = jnp.where(valid, rewards, jnp.inf).min(-1)
    # Compared exactly: the mean of equal numbers may differ from them by a rounding error, which 1 / eps would blow up.
    flat = ~(highest > lowest)
    centred = jnp.where(valid & ~flat[:, None], rewards - rewards.sum(-1, keepdims=True) / count, 0.0)
    if scale_by_std:
        centred = centred / (jnp.sqrt((centred**2).sum(-1, keepdims=True) / count) + eps)
    return centred, flat


def action_weights(mask: jax.Array, normaliser: str) -> jax.Array:
    """Weights [b, g, t] that turn a sum over actions into the chosen mean; zero outside `mask`.

    `constant` divides every sample by the same length t (Dr. GRPO: long samples are not discounted), `sequence` takes
    the mean inside each sample first (GRPO), `token` the mean over all actions of the batch (DAPO). Computed for the
    whole batch, so that gradients of microbatches add up exactly.
    """
    weights = mask.astype(jnp.float32)
    samples = jnp.maximum(mask.any(-1).sum(), 1)
    if normaliser == "constant":
        return weights / (samples * mask.shape[-1])
    if normaliser == "sequence":
        return weights / (jnp.maximum(weights.sum(-1, keepdims=True), 1) * samples)
    if normaliser == "token":
        return weights / jnp.maximum(weights.sum(), 1)
    raise ValueError(f"unknown normaliser {normaliser!r}")


def log_ratio(new: jax.Array, old: jax.Array) -> jax.Array:
    """new - old in float32, clipped to +-20."""
    return jnp.clip(new.astype(jnp.float32) - old.astype(jnp.float32), -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k3(new: jax.Array, ref: jax.Array) -> jax.Array:
    """Schulman's low-variance estimate of KL(new || ref) for actions drawn from `new`; never negative."""
    difference = log_ratio(ref, new)
    # expm1: in float32, exp(d) - d - 1 loses the small d of a policy near its reference and falls below 0.
    return jnp.maximum(jnp.expm1(difference) - difference, 0.0)


class Loss(NamedTuple):
    """Sums over actions: add those of microbatches."""

    loss: jax.Array  # weighted; minimise this: -(policy - beta * k3)
    kl: jax.Array  # k3 against the reference; divide by the number of actions
    clipped: jax.Array  # actions whose gradient the clip has cut


def loss(
    new: jax.Array,
    old: jax.Array,
    ref: jax.Array,
    advantage: jax.Array,
    weights: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
) -> Loss:
    """The clipped-ratio objective with the k3 penalty, negated.

    Args:
      new, old, ref: log-probabilities [b, g, t]; gradients flow through `new` alone.
      advantage: [b, g].
      weights: [b, g, t] from `action_weights`; where 0, the log-probabilities may hold anything finite.
    """
    old, ref, advantage = map(jax.lax.stop_gradient, (old, ref, advantage[..., None]))
    ratio = jnp.exp(log_ratio(new, old))
    unclipped = ratio * advantage
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    penalty = k3(new, ref)
    acting = weights > 0
    return Loss(
        loss=-(weights * (jnp.minimum(unclipped, clipped) - beta * penalty)).sum(),
        kl=jnp.where(acting, penalty, 0.0).sum(),
        clipped=(acting & (clipped < unclipped)).sum().astype(jnp.float32),
    )
