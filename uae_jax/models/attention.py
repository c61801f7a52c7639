"""Scaled dot-product attention: the one place where a kernel is chosen."""

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Softmax attention with grouped query heads, softmax in float32.

    Leading axes `...` are free (`[b]`, `[b, g]`, `[b, windows]`): groups are never flattened into the batch, so that
    a mesh may split either axis.

    Args:
      q: [..., t, n, h].
      k: [..., s, kv, h], where `kv` divides `n`; query head i reads key head i // (n // kv).
      v: [..., s, kv, h].
      mask: bool, broadcastable to [..., t, s]; False hides a key. A row that sees nothing returns the mean of `v`
        (finite, and to be ignored).
      bias: [n, t, s], added to the scaled products of all samples (T5's relative positions).
      scale: of the products; by default h**-0.5.

    Returns:
      [..., t, n, h] in q's dtype.
    """
    *batch, t, n, h = q.shape
    kv = k.shape[-2]
    if n % kv:
        raise ValueError(f"{n} query heads cannot share {kv} key heads")
    # Heads before tokens, and the queries of one key head as rows of one matrix: plain batched products.
    q = jnp.moveaxis(q.reshape(*batch, t, kv, n // kv, h), -4, -2).reshape(*batch, kv, n // kv * t, h)
    k, v = jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)
    logits = jnp.einsum("...qh,...sh->...qs", q, k, preferred_element_type=jnp.float32)
    logits = (logits * (h**-0.5 if scale is None else scale)).reshape(*batch, kv, n // kv, t, k.shape[-2])
    if bias is not None:
        logits = logits + bias.reshape(kv, n // kv, t, k.shape[-2]).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*batch, kv, n // kv * t, k.shape[-2])
    out = jnp.einsum("...qs,...sh->...qh", weights, v).reshape(*batch, kv, n // kv, t, h)
    return jnp.moveaxis(out, -2, -4).reshape(*batch, t, n, h)
