"""Scaled dot-product attention: the one place where a kernel is chosen."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from uae_jax import sharding

# Shorter sequences (a token being decoded, a window, a caption) are a few products that XLA does as well.
SHORTEST = 256


def kernel(
    platform: str, dtype: jnp.dtype, queries: int, keys: int, head_dim: int, *, shared_keys: bool, general: bool
) -> str:
    """Which kernel computes an attention: `splash` (TPU, blockwise), `cudnn` (NVIDIA, blockwise) or `xla`.

    Args:
      platform: tpu, gpu, cpu.
      dtype: of queries, keys and values.
      queries: their number; 1 in a decode loop.
      keys: their number.
      head_dim: channels of a head.
      shared_keys: several query heads read one key head.
      general: there is a bias, or a mask that differs from query to query: only XLA's takes them.
    """
    if general or shared_keys or min(queries, keys) < SHORTEST or head_dim % 8:
        return "xla"
    if platform == "tpu" and head_dim <= 256:
        return "splash"
    if platform == "gpu" and head_dim <= 128 and dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "xla"


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
    a mesh may split either axis. The kernel is that of the platform whose mesh is in context (`sharding.under`).

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
    s, kv = k.shape[-3:-1]
    if n % kv:
        raise ValueError(f"{n} query heads cannot share {kv} key heads")
    scale = h**-0.5 if scale is None else scale
    general = bias is not None or (mask is not None and mask.shape[-2] != 1)
    chosen = kernel(sharding.platform(), q.dtype, t, s, h, shared_keys=n != kv, general=general)
    if chosen == "xla":
        return xla(q, k, v, mask, bias, scale)
    seen = jnp.ones((*batch, s), bool) if mask is None else jnp.broadcast_to(mask[..., 0, :], (*batch, s))
    function = functools.partial(splash if chosen == "splash" else cudnn, scale=scale)
    # A kernel of its own is opaque to the partitioner: each device is told which part of the batch is its.
    mesh = jax.sharding.get_abstract_mesh()
    spec = P(*[None] * max(len(batch) - 2, 0), *sharding.leading_axes(mesh, tuple(batch)))
    split = jax.shard_map(function, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
    return split(q, k, v, seen)


def xla(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, bias: jax.Array | None, scale: float
) -> jax.Array:
    """`attention` in plain products."""
    *batch, t, n, h = q.shape
    kv = k.shape[-2]
    # Heads before tokens, and the queries of one key head as rows of one matrix: plain batched products.
    q = jnp.moveaxis(q.reshape(*batch, t, kv, n // kv, h), -4, -2).reshape(*batch, kv, n // kv * t, h)
    k, v = jnp.swapaxes(k, -3, -2), jnp.swapaxes(v, -3, -2)
    logits = jnp.einsum("...qh,...sh->...qs", q, k, preferred_element_type=jnp.float32)
    logits = (logits * scale).reshape(*batch, kv, n // kv, t, k.shape[-2])
    if bias is not None:
        logits = logits + bias.reshape(kv, n // kv, t, k.shape[-2]).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype).reshape(*batch, kv, n // kv * t, k.shape[-2])
    out = jnp.einsum("...qs,...sh->...qh", weights, v).reshape(*batch, kv, n // kv, t, h)
    return jnp.moveaxis(out, -2, -4).reshape(*batch, t, n, h)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float, interpret: bool = False
) -> jax.Array:
    """JAX's splash attention kernel for TPUs, on one device's part of a batch, as many key heads as query heads.

    Args:
      q: [..., t, n, h].
      k: [..., s, n, h].
      v: [..., s, n, h].
      seen: bool [..., s]; False hides a key.
      scale: of the products.
      interpret: run the kernel as plain operations, for tests without a TPU.

    Returns:
      [..., t, n, h] in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    *batch, t, n, h = q.shape
    block = 512 if min(t, k.shape[-3]) >= 512 else 128

    def padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % multiple)
        return jnp.pad(x, widths)

    def laid_out(x: jax.Array) -> jax.Array:
        """[..., t, n, h] -> [rows, n, t, h], t in whole blocks, h in registers of 128; zeros change no product."""
        x = padded(padded(x, -3, block), -1, 128)
        return jnp.swapaxes(x.reshape(-1, *x.shape[-3:]), 1, 2)

    q, k, v = laid_out(q * jnp.asarray(scale, q.dtype)), laid_out(k), laid_out(v)
    seen = padded(seen, -1, block).reshape(-1, k.shape[2])
    # A query sees the keys of its own segment: 1. Padding and hidden keys are of segment 0.
    segments = kernels.SegmentIds(q=jnp.ones((len(seen), q.shape[2]), jnp.int32), kv=seen.astype(jnp.int32))
    blocks = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    everything = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2])) for _ in range(n)])
    run = kernels.make_splash_mha_single_device(everything, block_sizes=blocks, interpret=interpret)
    out = jnp.swapaxes(jax.vmap(run)(q, k, v, segments), 1, 2)
    return out[:, :t, :, :h].reshape(*batch, t, n, h)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float) -> jax.Array:
    """cuDNN's fused attention, on one device's part of a batch; arguments as in `splash`."""
    *batch, t, n, h = q.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    rows = seen.reshape(-1, 1, 1, seen.shape[-1])
    mask = jnp.broadcast_to(rows, (len(rows), 1, t, rows.shape[-1]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn")
    return out.reshape(*batch, t, n, h)
