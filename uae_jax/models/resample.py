"""Resampling of pixels and position tables as two small matrices, exact to float64 whatever the size.

`jax.image.resize` computes its weights inside the program in float32, where the position of a pixel of a large image is
known to about 1e-4; here they are constants of the program, so that it gives the same numbers compiled or not.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _linear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def matrix(size: int, new_size: int, kernel: str, start: int = 0, count: int | None = None) -> np.ndarray:
    """Weights [count, size] that resample an axis; rows sum to 1.

    Args:
      size: pixels along the axis.
      new_size: pixels afterwards.
      kernel: "linear" or "cubic" (a = -0.5), stretched to anti-alias where the axis shrinks and cut off at the edges,
        as PIL and torch's antialias=True do it; or "cubic_sharp" (a = -0.75), never stretched, with edge pixels
        repeated, as torch's bicubic without antialias does it.
      start, count: which of the new pixels are wanted; all by default. A crop of a long picture needs few.
    """
    scale = size / new_size
    count = new_size if count is None else count
    centres = (start + np.arange(count) + 0.5) * scale
    if kernel == "cubic_sharp":
        first = np.floor(centres - 0.5).astype(int)
        weights = np.zeros((count, size))
        for tap in range(-1, 3):
            at = first + tap
            np.add.at(
                weights,
                (np.arange(count), np.clip(at, 0, size - 1)),
                _cubic(np.abs(at + 0.5 - centres), -0.75),
            )
        return weights
    distance = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = _linear(distance) if kernel == "linear" else _cubic(distance, -0.5)
    return weights / weights.sum(1, keepdims=True)


def apply(weights: np.ndarray, x: jax.Array, axis: int) -> jax.Array:
    """Resamples one axis of x by the weights of `matrix` [new size, size], in float32."""
    x = jnp.moveaxis(x.astype(jnp.float32), axis, -1)
    y = jnp.matmul(x, jnp.asarray(weights.T, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, -1, axis)
