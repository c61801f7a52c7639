"""What the MM-DiTs of SD3 and FLUX share: time sinusoids, adaptive norms, embedders and feed-forward layers."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models.dense import Dense

TIME_CHANNELS = 256

# Gates, shifts and the head start close to zero (adaLN-Zero, Peebles & Xie 2023), yet far enough from it that a fresh
# model depends on all of its inputs.
NEAR_ZERO = nn.initializers.normal(0.02)


def timestep_embedding(timestep: jax.Array) -> jax.Array:
    """Sinusoids of a timestep in 0..1000, float32 [...] -> [..., 256], cosines first (Vaswani et al. 2017)."""
    half = TIME_CHANNELS // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    # Exponents rounded as in the reference, then a correctly rounded exp: one ulp is 1e-4 of a radian at time 1000.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(dtype: jnp.dtype) -> nn.LayerNorm:
    """The norm without scale and shift that a modulation follows."""
    return nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, use_fast_variance=False, dtype=dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies a shift and a scale around one."""
    return x * (1 + scale) + shift


class Modulation(nn.Module):
    """The `chunks` shifts, scales and gates of a block: [..., d] -> `chunks` x [..., 1, d], once per sample."""

    chunks: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        x = Dense(self.chunks * condition.shape[-1], dtype=self.dtype, kernel_init=NEAR_ZERO, name="linear")(condition)
        return jnp.split(x[..., None, :], self.chunks, axis=-1)


class Embedder(nn.Module):
    """Linear, SiLU, linear: [..., k] -> [..., width]."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
        return Dense(self.width, dtype=self.dtype, name="linear_2")(x)


class FeedForward(nn.Module):
    """Linear to 4 d, tanh GELU, linear back: [..., d] -> [..., d]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(Dense(4 * width, dtype=self.dtype, name="up")(x), approximate=True)
        return Dense(width, dtype=self.dtype, name="down")(x)
