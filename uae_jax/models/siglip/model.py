"""SigLIP (Zhai et al. 2023) and SigLIP2 at a fixed size, as transformers' `SiglipModel` computes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.errors import UserError
from uae_jax.models import vit
from uae_jax.models.attention import attention
from uae_jax.models.clip.config import TextConfig, VisionConfig
from uae_jax.models.clip.model import activation, encoder
from uae_jax.models.dense import Dense
from uae_jax.models.siglip.config import Config


class PoolingHead(nn.Module):
    """Attention of one learnt query over all patches, and an MLP: [..., n, d] -> [..., d]."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, dtype, d = self.config, self.dtype, x.shape[-1]
        probe = self.param("probe", nn.initializers.normal(0.02), (1, 1, d))[0].astype(dtype)
        # One matrix holds the projections of queries, keys and values, as in torch's MultiheadAttention.
        project = Dense(3 * d, dtype=dtype, name="in_proj")
        q = jnp.split(project(probe), 3, axis=-1)[0]
        _, k, v = jnp.split(project(x), 3, axis=-1)
        q = jnp.broadcast_to(q, (*x.shape[:-2], 1, d))
        q, k, v = (y.reshape(*y.shape[:-1], config.num_attention_heads, -1) for y in (q, k, v))
        y = attention(q, k, v).reshape(*x.shape[:-2], d)
        x = Dense(d, dtype=dtype, name="out_proj")(y)
        y = Dense(config.intermediate_size, dtype=dtype, name="fc1")(
            vit.norm(self, "layernorm", config.layer_norm_eps)(x)
        )
        return x + Dense(d, dtype=dtype, name="fc2")(activation(config.hidden_act)(y))


class VisionTower(nn.Module):
    """Image tower: pixels [..., H, W, C] -> (patches after the final norm [..., n, d], pooled [..., d])."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, dtype = self.config, self.dtype
        if pixels.shape[-3:-1] != (config.image_size, config.image_size):
            height, width = pixels.shape[-3:-1]
            raise UserError(
                f"this SigLIP reads images of {config.image_size}x{config.image_size}, not {height}x{width} pixels"
            )
        x = vit.patches(pixels, config.patch_size, config.num_channels)
        x = x.reshape(*x.shape[:-3], config.num_patches, x.shape[-1])
        x = Dense(config.hidden_size, dtype=dtype, name="patch_embedding")(x)
        shape = (config.num_patches, config.hidden_size)
        x = x + self.param("position_embedding", nn.initializers.normal(0.02), shape).astype(dtype)
        x, _ = encoder(config, dtype)(x, None)
        x = vit.norm(self, "post_layernorm", config.layer_norm_eps)(x)
        return x, PoolingHead(config, dtype, name="head")(x)


class TextTower(nn.Module):
    """Text tower, without a causal mask: ids [..., t] -> [..., projection_size], read off at the last token."""

    config: TextConfig
    projection_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config, dtype, t = self.config, self.dtype, tokens.shape[-1]
        if t > config.max_position_embeddings:
            raise UserError(f"this SigLIP reads at most {config.max_position_embeddings} tokens, not {t}")
        normal = nn.initializers.normal(0.02)
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, embedding_init=normal, name="token_embedding"
        )
        positions = self.param("position_embedding", normal, (config.max_position_embeddings, config.hidden_size))
        x, _ = encoder(config, dtype)(embed(tokens) + positions[:t].astype(dtype), None)
        x = vit.norm(self, "final_layer_norm", config.layer_norm_eps)(x)[..., -1, :]
        return Dense(self.projection_size, dtype=dtype, name="head")(x)


class SigLIP(nn.Module):
    """Image and, where the config has one, text encoder with a shared space. Features are not normalised.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision = VisionTower(self.config.vision, self.dtype)
        if self.config.text is not None:
            self.text = TextTower(
                self.config.text, self.config.projection_size or self.config.text.hidden_size, self.dtype
            )
            self.logit_scale = self.param("logit_scale", nn.initializers.zeros, (1,))
            self.logit_bias = self.param("logit_bias", nn.initializers.zeros, (1,))

    def vision_hidden(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Patches after the final norm [..., n, d] and the pooled embedding [..., d].

        Args:
          pixels: [..., image_size, image_size, 3] in -1..1.

        Raises:
          UserError: the images are of another size.
        """
        return self.vision(pixels)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """The pooled embedding [..., d] of pixels as in `vision_hidden`."""
        return self.vision(pixels)[1]

    def text_features(self, tokens: jax.Array) -> jax.Array:
        """Text embedding: ids [..., t], padded to the length of training -> [..., projection_size]."""
        return self.text(tokens)

    def __call__(self, pixels: jax.Array, tokens: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """(image features,), with text (image features, text features, scale of their cosine as a logit, its bias)."""
        if tokens is None:
            return (self.image_features(pixels),)
        scale, bias = jnp.exp(self.logit_scale[0]), self.logit_bias[0]
        return self.image_features(pixels), self.text_features(tokens), scale, bias
