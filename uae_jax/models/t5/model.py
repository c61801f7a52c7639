"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for its feed-forward), transformers' `T5EncoderModel`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.t5.config import Config


def buckets(tokens: int, config: Config) -> np.ndarray:
    """The bucket int [t, t] of each (query, key) pair: exact for near keys, logarithmic up to the maximum distance."""
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    distance = np.abs(offset)
    # float32, as in the reference: distances on a boundary between buckets are decided by rounding.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    span = np.float32(np.log(config.relative_attention_max_distance / exact))
    far = exact + (ratio / span * np.float32(half - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)


class Layer(nn.Module):
    """Pre-norm block: [..., t, d] -> [..., t, d], with the bias [n, t, t] of all layers and a mask as in T5Encoder."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=self.dtype, name=name)

        y = norm("attention_norm")(x)
        heads = (*x.shape[:-1], config.num_heads, config.d_kv)
        q, k, v = (dense(config.num_heads * config.d_kv, name)(y).reshape(heads) for name in "qkv")
        y = attention(q, k, v, mask, bias=bias, scale=1.0)
        x = x + dense(config.d_model, "o")(y.reshape(*x.shape[:-1], -1))
        y = norm("feed_forward_norm")(x)
        gate = nn.gelu(dense(config.d_ff, "wi_0")(y), approximate=True)
        return x + dense(config.d_model, "wo")(gate * dense(config.d_ff, "wi_1")(y)), None


class T5Encoder(nn.Module):
    """Text to states.

    Parameters: shared (the token embedding), relative_attention_bias, layers (stacked along a leading layer axis),
    final_layer_norm.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """States of all tokens.

        Args:
          tokens: ids [..., t].
          mask: bool [..., t]; False hides a token from the others. The pipelines of SD3 and FLUX pass none: there
            padding is seen.

        Returns:
          [..., t, d_model] in `dtype`.
        """
        config, t = self.config, tokens.shape[-1]
        embed = nn.Embed(
            config.vocab_size,
            config.d_model,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="shared",
        )
        shape = (config.relative_attention_num_buckets, config.num_heads)
        table = self.param("relative_attention_bias", nn.initializers.normal(config.d_model**-0.5), shape)
        bias = jnp.moveaxis(table[buckets(t, config)], -1, 0)
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config, self.dtype, name="layers")
        x, _ = layers(embed(tokens), bias, None if mask is None else mask[..., None, :])
        return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=self.dtype, name="final_layer_norm")(x)
