"""What the vision transformers of the DINO family share."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.errors import UserError
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}


def patches(pixels: jax.Array, size: int, channels: int) -> jax.Array:
    """Pixels [..., H, W, C] -> patches [..., H // size, W // size, C * size * size], as rows of a convolution.

    Pixels past the last whole patch are not read.

    Raises:
      UserError: other channels than expected, or an image smaller than a patch.
    """
    *batch, height, width, found = pixels.shape
    if found != channels or min(height, width) < size:
        raise UserError(
            f"this tower reads images of {channels} channels and at least {size}x{size} pixels, "
            f"not {height}x{width}x{found}"
        )
    h, w = height // size, width // size
    x = pixels[..., : h * size, : w * size, :].reshape(*batch, h, size, w, size, found)
    return jnp.einsum("...hpwqc->...hwcpq", x).reshape(*batch, h, w, found * size * size)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions: x [..., t, n, h] turned by angles [t, h] whose halves are equal."""
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return (x * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention: [..., t, d] -> [..., t, d].

    Attributes:
      heads: number of heads.
      biases: whether query, key, value and output have one.
      dtype: compute dtype.
    """

    heads: int
    biases: tuple[bool, bool, bool, bool]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        d = x.shape[-1]
        heads = (*x.shape[:-1], self.heads, d // self.heads)
        q, k, v = (
            Dense(d, use_bias=bias, dtype=self.dtype, name=name)(x).reshape(heads)
            for name, bias in zip(("query", "key", "value"), self.biases, strict=False)
        )
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        y = attention(q, k, v).reshape(x.shape)
        return Dense(d, use_bias=self.biases[3], dtype=self.dtype, name="out")(y)


class GatedMLP(nn.Module):
    """act(gate(x)) * up(x), projected back: [..., d] -> [..., d]; gate and up apart, or `fused` in one matrix."""

    hidden_size: int
    hidden_act: str
    use_bias: bool
    fused: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(size: int, name: str) -> Dense:
            return Dense(size, use_bias=self.use_bias, dtype=self.dtype, name=name)

        if self.fused:
            gate, up = jnp.split(dense(2 * self.hidden_size, "gate_up")(x), 2, axis=-1)
        else:
            gate, up = dense(self.hidden_size, "gate")(x), dense(self.hidden_size, "up")(x)
        return dense(x.shape[-1], "down")(ACTIVATIONS[self.hidden_act](gate) * up)


class MLP(nn.Module):
    """down(act(up(x))): [..., d] -> [..., d]."""

    hidden_size: int
    hidden_act: str
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(self.hidden_size, use_bias=self.use_bias, dtype=self.dtype, name="up")(x)
        y = ACTIVATIONS[self.hidden_act](y)
        return Dense(x.shape[-1], use_bias=self.use_bias, dtype=self.dtype, name="down")(y)


class Layer(nn.Module):
    """Pre-norm layer with layer scale, to be scanned: ([..., t, d], angles) -> ([..., t, d], None).

    Attributes:
      attention: the attention's arguments.
      mlp: builds the layer's MLP under the name it is given.
      eps: of the norms.
      dtype: compute dtype.
    """

    attention: tuple[int, tuple[bool, bool, bool, bool]]
    mlp: Callable[[], nn.Module]
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, None]:
        def scale(name: str) -> jax.Array:
            return self.param(name, nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)

        y = SelfAttention(*self.attention, self.dtype, name="attention")(norm(self, "norm1", self.eps)(x), angles)
        x = x + scale("scale1") * y
        return x + scale("scale2") * self.mlp()(norm(self, "norm2", self.eps)(x)), None


def norm(parent: nn.Module, name: str, eps: float) -> nn.LayerNorm:
    """A layer norm that computes in float32."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=parent.dtype, name=name)  # type: ignore[attr-defined]


def layers(
    count: int,
    attention: tuple[int, tuple[bool, bool, bool, bool]],
    mlp: Callable[[], nn.Module],
    eps: float,
    dtype: jnp.dtype,
) -> nn.Module:
    """`count` layers, scanned: their parameters have a leading layer axis."""
    scanned = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=count
    )
    return scanned(attention, mlp, eps, dtype, name="layers")
