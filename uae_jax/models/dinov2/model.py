"""DINOv2 (Oquab et al. 2023), as transformers' `Dinov2Model` and `Dinov2WithRegistersModel` compute it."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.models import resample, vit
from uae_jax.models.dense import Dense
from uae_jax.models.dinov2.config import Config


def positions(table: jax.Array, height: int, width: int, config: Config) -> jax.Array:
    """The learnt positions [1 + grid**2, d] of an image of height x width patches: [1 + height * width, d].

    Interpolated bicubically where the grids differ: with antialias (and its kernel) in the release with registers,
    without in the other.
    """
    side = config.grid
    if (height, width) == (side, side):
        return table
    kernel = "cubic_sharp" if config.num_register_tokens is None else "cubic"
    grid = table[1:].reshape(side, side, -1)
    for axis, size in enumerate((height, width)):
        grid = resample.apply(resample.matrix(side, size, kernel), grid, axis)
    return jnp.concatenate([table[:1], grid.reshape(height * width, -1).astype(table.dtype)])


class DINOv2(nn.Module):
    """Vision transformer without a head.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """States of all tokens, after the final norm.

        Args:
          pixels: [..., H, W, 3], normalised with ImageNet's mean and standard deviation.

        Returns:
          [..., 1 + registers + patches, d]: the class token (transformers' `pooler_output`), registers, patches.

        Raises:
          UserError: the images have other channels, or are smaller than a patch.
        """
        config, dtype, d = self.config, self.dtype, self.config.hidden_size
        zeros, normal = nn.initializers.zeros, nn.initializers.normal(0.02)
        x = vit.patches(pixels, config.patch_size, config.num_channels)
        *batch, height, width, _ = x.shape
        x = Dense(d, dtype=dtype, name="patch_embedding")(x).reshape(*batch, height * width, d)
        first = self.param("cls_token", normal, (1, 1, d))[0].astype(dtype)
        if config.num_register_tokens is not None or config.use_mask_token:
            self.param("mask_token", zeros, (1, d))  # of pre-training; it travels with the weights

        def repeat(tokens: jax.Array) -> jax.Array:
            return jnp.broadcast_to(tokens, (*batch, *tokens.shape))

        x = jnp.concatenate([repeat(first), x], axis=-2)
        table = self.param("position_embeddings", normal, (1, 1 + config.grid**2, d))[0]
        x = x + positions(table, height, width, config).astype(dtype)
        if config.num_register_tokens is not None:
            registers = self.param("register_tokens", zeros, (1, config.num_register_tokens, d))[0].astype(dtype)
            x = jnp.concatenate([x[..., :1, :], repeat(registers), x[..., 1:, :]], axis=-2)

        bias = config.qkv_bias
        x, _ = vit.layers(
            config.num_hidden_layers,
            (config.num_attention_heads, (bias, bias, bias, True)),
            _mlp(config, dtype),
            config.layer_norm_eps,
            dtype,
        )(x, None)
        return vit.norm(self, "layernorm", config.layer_norm_eps)(x)


def _mlp(config: Config, dtype: jnp.dtype) -> Callable[[], nn.Module]:
    width = config.intermediate_size
    if config.use_swiglu_ffn:
        return lambda: vit.GatedMLP(width, "silu", True, True, dtype, name="mlp")
    return lambda: vit.MLP(width, config.hidden_act, True, dtype, name="mlp")
