"""Qwen2.5-VL's language model: a decoder with grouped query heads, multimodal rotary positions and a key-value cache.

Axes: `...` are free batch axes ([b] or [b, g]), t(okens), s(lots), d(model), n(heads), kv(heads), h(ead), L(ayers).
A slot is where a key lies in the cache; its rotary position is a separate thing, and the mask decides who sees it.
"""

import functools
import itertools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models import rematerialised
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.qwen2_5_vl.config import TextConfig
from uae_jax.sharding import batch_kept


@flax.struct.dataclass
class Cache:
    """Rotated keys, and values, of all layers."""

    k: jax.Array  # [L, ..., s, kv, h]
    v: jax.Array  # [L, ..., s, kv, h]


class RMSNorm(nn.Module):
    """`Qwen2_5_VLRMSNorm`: normalised in float32, cast back, then scaled. [..., d] -> [..., d]."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class SwiGLU(nn.Module):
    """`Qwen2MLP` and, with biases, `Qwen2_5_VLMLP`. [..., d] -> [..., d]."""

    width: int
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, use_bias=self.use_bias, dtype=self.dtype)
        gate = nn.silu(dense(self.width, name="gate_proj")(x))
        return dense(x.shape[-1], name="down_proj")(gate * dense(self.width, name="up_proj")(x))


def inverse_frequencies(dim: int, theta: float) -> np.ndarray:
    """Angular speeds [dim / 2] of a rotary embedding over `dim` channels."""
    return np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary embedding, channel i paired with i + h/2, in float32.

    Args:
      x: [..., t, n, h].
      angles: float32 [..., t, h / 2].
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def with_images(embeds: jax.Array, placeholder: jax.Array, features: jax.Array) -> jax.Array:
    """Token embeddings with the row's i-th image feature in place of its i-th placeholder.

    Args:
      embeds: [..., t, d].
      placeholder: bool [..., t].
      features: [..., n, d]; at least as many as the row has placeholders, the rest is not used. Leading axes of size 1
        broadcast.

    Returns:
      [..., t, d].
    """
    which = jnp.clip(jnp.cumsum(placeholder, axis=-1) - 1, 0, features.shape[-2] - 1)
    placed = jnp.take_along_axis(features, which[..., None], axis=-2)
    return jnp.where(placeholder[..., None], placed.astype(embeds.dtype), embeds)


def text_positions(positions: jax.Array) -> jax.Array:
    """Rotary positions of plain text: the same on all three axes. [..., t] -> [3, ..., t]."""
    return jnp.broadcast_to(positions, (3, *positions.shape))


def mrope_angles(positions: jax.Array, config: TextConfig) -> jax.Array:
    """Angles of the multimodal rotary embedding (`Qwen2_5_VLRotaryEmbedding`).

    Products, no matrix multiplication: they stay exact in float32 whatever the matmul precision.

    Args:
      positions: int [3, ..., t]: time, height, width; [1, ..., t] where there is one section.

    Returns:
      float32 [..., t, h / 2]; consecutive sections of the frequencies read consecutive axes.
    """
    ends = list(itertools.accumulate(config.mrope_section))
    sections = np.split(inverse_frequencies(config.head_dim, config.rope_theta), ends[:-1])
    axes = positions.astype(jnp.float32)[..., None]
    return jnp.concatenate([axes[i % 3] * section for i, section in enumerate(sections)], axis=-1)


def _write(slots: jax.Array, new: jax.Array, index: jax.Array | int) -> jax.Array:
    """Puts `new` [..., t, kv, h] at slots index..index+t of [..., s, kv, h]."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis=slots.ndim - 3)


class SelfAttention(nn.Module):
    """`Qwen2_5_VLAttention`, biased query, key and value, or `LlamaAttention`; the output has no bias."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, angles: jax.Array, mask: jax.Array, index: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        c = self.config

        def heads(number: int, name: str) -> jax.Array:
            y = Dense(number * c.head_dim, use_bias=c.attention_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], number, c.head_dim)

        q = rotate(heads(c.num_heads, "q_proj"), angles)
        new = Cache(k=rotate(heads(c.num_kv_heads, "k_proj"), angles), v=heads(c.num_kv_heads, "v_proj"))
        seen = new if cache is None else jax.tree.map(lambda old, part: _write(old, part, index), cache, new)
        y = attention(q, seen.k, seen.v, mask).reshape(*x.shape[:-1], -1)
        return Dense(c.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")(y), new


class DecoderLayer(nn.Module):
    """`Qwen2_5_VLDecoderLayer`, shaped for a scan over layers: hands out the keys and values of its own tokens."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, angles: jax.Array, mask: jax.Array, index: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        c, x = self.config, batch_kept(x, spare=False)
        y = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        y, new = SelfAttention(c, self.dtype, name="self_attn")(y, cache, angles, mask, index)
        x = x + y
        y = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        return x + SwiGLU(c.intermediate_size, use_bias=False, dtype=self.dtype, name="mlp")(y), new


class LanguageModel(nn.Module):
    """`Qwen2_5_VLTextModel` with its head."""

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=nn.initializers.normal(0.02)
        )
        self.layers = nn.scan(
            rematerialised(DecoderLayer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, self.dtype)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Dense(
                c.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [..., t] -> [..., t, d]."""
        return self.embed_tokens(tokens)

    def __call__(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Runs all layers.

        Args:
          embeds: [..., t, d].
          positions: int [3, ..., t], rotary (time, height, width), see `text_positions`; [1, ..., t] for Llama.
          mask: bool, two axes or more, broadcastable to [..., t, s]; True where a token sees a slot. Causality is part
            of it.
          cache: s slots; the new keys and values go to slots index..index+t, the same for the whole batch.
          index: first slot to write; unused without a cache, where s = t.

        Returns:
          Hidden states [..., t, d] after the final norm, and the cache (the given one, updated, or the t new slots).
        """
        angles = mrope_angles(positions, self.config)
        hidden, new = self.layers(embeds.astype(self.dtype), cache, angles, mask, index)
        # Written once for all layers, after the scan: had each layer handed out its whole updated cache, every token
        # would copy all of it.
        cache = new if cache is None else jax.tree.map(lambda old, part: _write(old, part, index), cache, new)
        return self.norm(hidden), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d] -> float32 [..., v], through the tied embedding or the head."""
        hidden = hidden.astype(self.dtype)
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        table = self.embed_tokens.embedding.astype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
