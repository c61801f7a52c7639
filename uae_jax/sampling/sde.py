"""The stochastic sampler of a flow model: every step a Gaussian, so that denoising steps are actions of a policy.

The SDE of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) has the marginals of the ODE of `flow.euler`. Per step, from
noise level s to the next, dt = next - s < 0, at noise a:

    w^2  = a^2 s / (1 - s)                       (at s = 1, where this is infinite, 1 - s is taken at the next level)
    mean = x (1 + w^2 dt / (2 s)) + v (1 + w^2 (1 - s) / (2 s)) dt
    std  = w sqrt(-dt)

and a log-probability is averaged over the elements of a latent, as published, so that its scale does not depend on the
size of the image. At a = 0 it is the ODE.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.sampling.tokens import map_keys

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


class Path(NamedTuple):
    """A sampled path. `k` counts the steps whose noise is above 0: the others are no actions.

    Attributes:
      latents: [..., steps + 1, H, W, C] float32, from the initial noise to the sample.
      log_probs: [..., k], of the latent after each stochastic step given the one before.
    """

    latents: jax.Array
    log_probs: jax.Array


class Scores(NamedTuple):
    """A path as another policy sees it.

    Attributes:
      log_probs: [..., k] float32.
      means: [..., k, H, W, C] float32, of each stochastic step.
      stds: [k], the same for every policy.
    """

    log_probs: jax.Array
    means: jax.Array
    stds: jax.Array


def gaussians(levels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Rows (a, b, std) of each step's N(a x + b v, std^2), float64 [steps, 3].

    Args:
      levels: [steps + 1] noise levels from 1 to 0, from `flow.sigmas`.
      noise: [steps] noise of each step, 0.7 in Flow-GRPO; a step with 0 is one of the ODE.

    Raises:
      ValueError: the noise is negative or not one number a step.
    """
    levels, noise = np.asarray(levels, np.float64), np.asarray(noise, np.float64)
    if noise.shape != (len(levels) - 1,) or (noise < 0).any():
        raise ValueError(f"noise {noise} is not a number from 0 for each of {len(levels) - 1} steps")
    s, dt = levels[:-1], np.diff(levels)
    gap = 1.0 - np.where(s == 1.0, levels[1], s)
    w2 = noise**2 * s / gap
    return np.stack([1.0 + w2 * dt / (2 * s), (1.0 + w2 * (1.0 - s) / (2 * s)) * dt, np.sqrt(-w2 * dt)], axis=1)


def _log_prob(x: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Mean log-density over the last three axes."""
    density = -0.5 * ((x - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    return density.mean(axis=(-3, -2, -1))


def sample(velocity: Velocity, initial: jax.Array, levels: np.ndarray, noise: np.ndarray, keys: jax.Array) -> Path:
    """Draws a path in one scan.

    Args:
      velocity: (x like initial, sigma scalar) -> like initial.
      initial: [..., H, W, C] float32, the noise at the first level.
      levels, noise: see `gaussians`.
      keys: [...], one a sample, which therefore does not depend on its neighbours.
    """
    table = gaussians(levels, noise)
    stochastic = np.flatnonzero(table[:, 2])

    def step(x: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        i, sigma, (a, b, std) = inputs
        mean = a * x + b * velocity(x, sigma).astype(jnp.float32)
        drawn = map_keys(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[-3:]), keys)
        following = mean + std * drawn
        # Steps of the ODE have no density; what is computed for them is dropped below.
        return following, (following, _log_prob(following, mean, jnp.where(std > 0, std, 1.0)))

    inputs = (jnp.arange(len(table)), jnp.asarray(levels[:-1], jnp.float32), jnp.asarray(table, jnp.float32))
    _, (latents, log_probs) = jax.lax.scan(step, initial, inputs)
    latents = jnp.concatenate([initial[None], latents])
    return Path(jnp.moveaxis(latents, 0, -4), jnp.moveaxis(log_probs[stochastic], 0, -1))


def score(velocity: Velocity, latents: jax.Array, levels: np.ndarray, noise: np.ndarray) -> Scores:
    """Scores a path's stochastic steps, with gradients; the activations of one step are held at a time.

    Args:
      velocity: of the policy that scores, as in `sample`.
      latents: [..., steps + 1, H, W, C], a `Path`'s.
      levels, noise: what the path was sampled with.
    """
    table = gaussians(levels, noise)
    stochastic = np.flatnonzero(table[:, 2])

    def step(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x, following, sigma, (a, b, std) = inputs
        mean = a * x + b * velocity(x, sigma).astype(jnp.float32)
        return None, (_log_prob(following, mean, std), mean)

    latents = jnp.moveaxis(latents, -4, 0)
    rows = jnp.asarray(table[stochastic], jnp.float32)
    inputs = (latents[stochastic], latents[stochastic + 1], jnp.asarray(levels[stochastic], jnp.float32), rows)
    _, (log_probs, means) = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), None, inputs)
    return Scores(jnp.moveaxis(log_probs, 0, -1), jnp.moveaxis(means, 0, -4), rows[:, 2])
