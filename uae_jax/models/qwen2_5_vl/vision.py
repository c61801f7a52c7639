"""Qwen2.5-VL's vision tower: windowed attention, full attention every k-th block, 2x2 patch merger.

The host lays the patches out by window (see inputs.py), so that a windowed block is a batched attention over windows
and nothing is permuted on the device before the merged tokens are put back into raster order.

Axes: `...` are free batch axes, w(indows), l = patch slots in a window (ragged windows are padded), n merged tokens.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.models import rematerialised
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.qwen2_5_vl.config import VisionConfig
from uae_jax.models.qwen2_5_vl.language import RMSNorm, SwiGLU, inverse_frequencies, rotate
from uae_jax.sharding import batch_kept

ROPE_THETA = 10000.0


class Layout(NamedTuple):
    """Where the patches of one row of images lie; int arrays. Everything that depends on image sizes is in here."""

    positions: Any  # [..., w, l, 2]: row and column of the patch in its image
    frames: Any  # [..., w, l]: which image (or frame) the patch belongs to; -1 = padding
    order: Any  # [..., n]: for each merged token, in raster order, its index among the w * l / 4 of the window layout


class VisionAttention(nn.Module):
    """`Qwen2_5_VLVisionAttention` over the second to last axis: [..., t, d] -> [..., t, d]."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array) -> jax.Array:
        d = x.shape[-1]
        qkv = Dense(3 * d, dtype=self.dtype, name="qkv")(x)
        q, k, v = (y.reshape(*x.shape[:-1], self.num_heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        y = attention(rotate(q, angles), rotate(k, angles), v, mask).reshape(x.shape)
        return Dense(d, dtype=self.dtype, name="proj")(y)


class VisionBlock(nn.Module):
    """`Qwen2_5_VLVisionBlock`, shaped for a scan."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        c, x = self.config, batch_kept(x, spare=False)
        x = x + VisionAttention(c.num_heads, self.dtype, name="attn")(RMSNorm(name="norm1")(x), angles, mask)
        mlp = SwiGLU(c.intermediate_size, use_bias=True, dtype=self.dtype, name="mlp")
        return x + mlp(RMSNorm(name="norm2")(x)), None


class Period(nn.Module):
    """k - 1 windowed blocks and one full block: [..., w, l, d] -> [..., w, l, d]."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: jax.Array, window_mask: jax.Array, frame_mask: jax.Array
    ) -> tuple[jax.Array, None]:
        block = rematerialised(VisionBlock, self.remat)
        if self.config.period > 1:
            windowed = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.config.period - 1,
            )
            x, _ = windowed(self.config, self.dtype, name="windowed")(x, angles, window_mask)
        # The full block sees the windows of a row as one sequence; its order does not matter to attention.
        *batch, windows, slots, d = x.shape
        flat = x.reshape(*batch, windows * slots, d)
        flat_angles = angles.reshape(*angles.shape[:-3], windows * slots, -1)
        flat, _ = block(self.config, self.dtype, name="full")(flat, flat_angles, frame_mask)
        return flat.reshape(x.shape), None


class PatchMerger(nn.Module):
    """`Qwen2_5_VLPatchMerger`: groups of 4 consecutive patches [..., p, d] -> [..., p / 4, out]."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *batch, p, d = x.shape
        width = d * self.config.merge_unit
        y = RMSNorm(name="ln_q")(x).reshape(*batch, p // self.config.merge_unit, width)
        y = nn.gelu(Dense(width, dtype=self.dtype, name="mlp_0")(y), approximate=False)
        return Dense(self.config.out_hidden_size, dtype=self.dtype, name="mlp_2")(y)


class VisionTower(nn.Module):
    """`Qwen2_5_VisionTransformerPretrainedModel`.

    Raises:
      UserError: the blocks with full attention are not every k-th block (`VisionConfig.period`).
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(self, patches: jax.Array, layout: Layout) -> jax.Array:
        """Encodes images.

        Args:
          patches: [..., w, l, patch_dim], normalised pixels; padding slots may hold anything finite.
          layout: int arrays with as many leading axes, of the same size or 1 (all rows alike).

        Returns:
          [..., n, out_hidden_size]: merged tokens in raster order, as `layout.order` lists them.
        """
        c = self.config
        x = Dense(c.hidden_size, use_bias=False, dtype=self.dtype, name="patch_embed")(patches)
        # Half of the rotated channel pairs turn with the row, half with the column.
        axes = jnp.asarray(layout.positions, jnp.float32)[..., None] * inverse_frequencies(c.head_dim // 2, ROPE_THETA)
        angles = axes.reshape(*axes.shape[:-2], -1)
        frames = jnp.asarray(layout.frames)
        window_mask = (frames >= 0)[..., None, :]
        frames = frames.reshape(*frames.shape[:-2], -1)
        frame_mask = (frames[..., :, None] == frames[..., None, :]) & (frames >= 0)[..., None, :]
        periods = nn.scan(
            Period,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.depth // c.period,
        )
        x, _ = periods(c, self.dtype, self.remat, name="blocks")(x, angles, window_mask, frame_mask)
        x = PatchMerger(c, self.dtype, name="merger")(x.reshape(*x.shape[:-3], -1, c.hidden_size))
        return jnp.take_along_axis(x, jnp.asarray(layout.order)[..., None], axis=-2)
