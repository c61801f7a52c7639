"""What the MM-DiTs of SD3 and FLUX share: config fields, time sinusoids, adaptive norms, embedders, feed-forwards."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.errors import UserError
from uae_jax.models.dense import Dense

TIME_CHANNELS = 256

# Gates, shifts and the head start close to zero (adaLN-Zero, Peebles & Xie 2023), yet far enough from it that a fresh
# model depends on all of its inputs.
NEAR_ZERO = nn.initializers.normal(0.02)


def diffusers_fields(config: type, class_name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The values that diffusers' `config.json` holds for a config dataclass; keys beginning with `_` are left out.

    Raises:
      UserError: it is another model's, or a field is missing or unknown.
    """
    name = hf.get("_class_name", class_name)
    if name != class_name:
        raise UserError(f"this is a {name} config, not a {class_name} one")
    values = {key: value for key, value in hf.items() if not key.startswith("_")}
    fields = dataclasses.fields(config)
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    unknown = sorted(values.keys() - {f.name for f in fields})
    if missing or unknown:
        raise UserError(f"{class_name} config: missing fields {missing}, unknown fields {unknown}")
    return values


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
