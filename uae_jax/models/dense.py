"""The linear layer of all models: flax's, with a backward pass that XLA's CPU compiler handles well, and adapters."""

from typing import Any

import jax
from flax import linen as nn


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., i] @ w [i, o].

    Same numbers as `x @ w`. JAX's own rule gives the weight's gradient as a transposed product, which makes the CPU
    compiler fuse whatever came before into a strided copy: an MLP's backward pass then takes more than twice as long.
    """
    return x @ w


def _forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    batch = tuple(range(x.ndim - 1))
    return gradient @ w.T, jax.lax.dot_general(x, gradient, ((batch, batch), ((), ())))


matmul.defvjp(_forward, _backward)


def _dot_general(x: jax.Array, w: jax.Array, *_: Any, **__: Any) -> jax.Array:
    # flax passes the dimension numbers of just this product.
    return matmul(x, w)


class Dense(nn.Dense):
    """`flax.linen.Dense`; where its parameters hold a low-rank adapter (LoRA), x @ kernel + (x @ lora_a) @ lora_b.

    Adapters are not made here: they are parameters beside `kernel` that a caller adds (see `uae_jax.lora`), or leaves
    out to have the layer without them.
    """

    dot_general: Any = _dot_general

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        y = super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return y
        names = ("lora_a", "lora_b")
        x, a, b = self.promote_dtype(inputs, *(self.get_variable("params", n) for n in names), dtype=self.dtype)
        return y + matmul(matmul(x, a), b).astype(y.dtype)
