"""Encoding and decoding in pieces, for when the activations of a large image do not fit."""

from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

# The share of a tile that it has in common with the next, as in diffusers.
OVERLAP = Fraction(1, 4)


def tiled(function: Callable[[jax.Array], jax.Array], x: jax.Array, tile: int, tile_out: int) -> jax.Array:
    """`function(x)` in overlapping square tiles that are blended into each other, as diffusers' `AutoencoderKL` does.

    This is not the function of the whole: a tile does not see the rest of the image (in group norms and attention), and
    the lower and right edges hold smaller tiles. An image of at most one tile is left whole, and exact.

    Args:
      function: [..., h, w, c] -> [..., h r, w r, c'] with r = tile_out / tile; the decoder, or the encoder's `moments`.
        Pass it jitted, outside of a larger program: it is compiled once for each of up to four shapes of tiles.
      x: [..., H, W, c].
      tile: side of a tile of x, in steps of 4 so that the overlap is whole (64 latents in SD3 and FLUX).
      tile_out: side of what becomes of it, likewise (512 pixels).

    Raises:
      ValueError: a side of the tiles is not a multiple of 4.
    """
    if tile % OVERLAP.denominator or tile_out % OVERLAP.denominator:
        raise ValueError(f"tiles of {tile} -> {tile_out} do not overlap by whole pixels")
    height, width = x.shape[-3:-1]
    if max(height, width) <= tile:
        return function(x)
    stride, extent = int(tile * (1 - OVERLAP)), int(tile_out * OVERLAP)
    limit = tile_out - extent
    rows: list[list[jax.Array]] = []
    for i in range(0, height, stride):
        row: list[jax.Array] = []
        for j in range(0, width, stride):
            part = function(x[..., i : i + tile, j : j + tile, :])
            if rows:
                part = _blend(rows[-1][len(row)], part, extent, -3)
            if row:
                part = _blend(row[-1], part, extent, -2)
            row.append(part)
        rows.append(row)
    return jnp.concatenate(
        [jnp.concatenate([part[..., :limit, :limit, :] for part in row], axis=-2) for row in rows], axis=-3
    )


def _blend(before: jax.Array, after: jax.Array, extent: int, axis: int) -> jax.Array:
    """`after`, whose first pixels along an axis fade in from the last ones of `before`."""
    extent = min(after.shape[axis], extent)  # the last tile may be shorter than what is blended
    ramp = np.arange(extent, dtype=np.float32) / extent
    ramp = np.expand_dims(ramp, tuple(range(1, -axis)))
    tail = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    head, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([(tail * (1 - ramp) + head * ramp).astype(after.dtype), rest], axis=axis)
