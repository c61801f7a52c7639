"""Flow matching: from noise (sigma 1) to data (sigma 0) along `x_sigma = (1 - sigma) x + sigma noise`.

The velocity is `noise - x`. A model may predict the velocity or the sample x itself; `to_velocity` turns the second
into the first. Reference for the schedule: diffusers' FlowMatchEulerDiscreteScheduler.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Levels = TypeVar("Levels", np.ndarray, jax.Array)

TRAIN_TIMESTEPS = 1000


def shifted(sigma: Levels, shift: float) -> Levels:
    """Moves noise levels towards 1 (SD3, arXiv 2403.03206, equation 23)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def sigmas(steps: int, shift: float, spacing: str, once: bool = False) -> np.ndarray:
    """Noise levels [steps + 1] from 1 down to 0.

    `diffusers`: what FlowMatchEulerDiscreteScheduler does for SD3, whose smallest level is shifted twice and lies close
    to 0; `once`, when the shift depends on the size of the image. `uniform`: linspace(1, 1 / steps), always shifted
    once, so that no step is spent beside 0 (FLUX's pipeline; the better choice for a handful of steps).
    """
    if spacing == "diffusers":
        lowest = np.asarray(1.0 / TRAIN_TIMESTEPS)
        levels = np.linspace(1.0, lowest if once else shifted(lowest, shift), steps)
    elif spacing == "uniform":
        levels = np.linspace(1.0, 1.0 / steps, steps)
    else:
        raise ValueError(f"unknown spacing {spacing!r}")
    return np.append(shifted(levels, shift), 0.0).astype(np.float32)


def to_velocity(prediction: jax.Array, x: jax.Array, sigma: jax.Array, kind: str) -> jax.Array:
    """The velocity from what the model predicts: `velocity` or `sample`."""
    if kind == "velocity":
        return prediction
    if kind == "sample":
        return (x - prediction) / sigma
    raise ValueError(f"unknown prediction {kind!r}")


def guided(conditional: jax.Array, unconditional: jax.Array, guidance: float) -> jax.Array:
    """Classifier-free guidance: u + w (c - u)."""
    return unconditional + guidance * (conditional - unconditional)


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, levels: np.ndarray) -> jax.Array:
    """Integrates the ODE dx = velocity(x, sigma) dsigma in one scan.

    Args:
      velocity: (x like noise, sigma scalar) -> like noise.
      noise: x at the first level, float32.
      levels: [steps + 1], from `sigmas`.
    """

    def step(x, pair):
        sigma, following = pair
        return x + velocity(x, sigma).astype(jnp.float32) * (following - sigma), None

    return jax.lax.scan(step, noise, jnp.stack([levels[:-1], levels[1:]], axis=1))[0]
