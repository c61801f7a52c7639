"""Janus' understanding tower, SigLIP without its pooling head, and the MLP that leads into the language model."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.errors import UserError
from uae_jax.models import rematerialised, vit
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.janus.config import VisionConfig
from uae_jax.sharding import batch_kept


class MLP(nn.Module):
    """`JanusVisionAlignerMLP`: `depth` linear layers to `width` with exact GELUs between. [..., i] -> [..., width]."""

    depth: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            x = nn.gelu(x, approximate=False) if i else x
            x = Dense(self.width, dtype=self.dtype, name=f"layer_{i}")(x)
        return x


class Layer(nn.Module):
    """`JanusVisionEncoderLayer`, to be scanned: [..., n, d] -> ([..., n, d], None)."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c, x = self.config, batch_kept(x)
        # Query, key and value lie on a leading axis, so that one matrix of all three and three matrices are both views.
        project = nn.vmap(
            Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=3
        )
        y = vit.norm(self, "norm1", c.layer_norm_eps)(x)
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        q, k, v = (part.reshape(heads) for part in project(c.hidden_size, dtype=self.dtype, name="qkv")(y))
        y = attention(q, k, v).reshape(x.shape)
        x = x + Dense(c.hidden_size, dtype=self.dtype, name="out")(y)
        mlp = vit.MLP(c.intermediate_size, "gelu", use_bias=True, dtype=self.dtype, name="mlp")
        return x + mlp(vit.norm(self, "norm2", c.layer_norm_eps)(x)), None


class VisionTower(nn.Module):
    """`JanusVisionModel`: pixels [..., H, W, 3] in -1..1 -> patches after the final norm, row by row [..., n, d]."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        if pixels.shape[-3:-1] != (c.image_size, c.image_size):
            height, width = pixels.shape[-3:-1]
            raise UserError(f"this Janus reads images of {c.image_size}x{c.image_size}, not {height}x{width} pixels")
        x = vit.patches(pixels, c.patch_size, c.num_channels)
        x = x.reshape(*x.shape[:-3], c.num_patches, x.shape[-1])
        x = Dense(c.hidden_size, dtype=self.dtype, name="patch_embedding")(x)
        shape = (c.num_patches, c.hidden_size)
        x = x + self.param("position_embedding", nn.initializers.normal(0.02), shape).astype(self.dtype)
        layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_hidden_layers,
        )
        x, _ = layers(c, self.dtype, name="layers")(x, None)
        return vit.norm(self, "post_layernorm", c.layer_norm_eps)(x)
