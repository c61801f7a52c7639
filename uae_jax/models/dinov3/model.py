"""DINOv3's vision transformers (Simeoni et al. 2025), as transformers' `DINOv3ViTModel` computes them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models import vit
from uae_jax.models.dense import Dense
from uae_jax.models.dinov3.config import Config


def angles(height: int, width: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [1 + registers + height * width, h] of the rotary positions; class token and registers stay.

    A patch's coordinates are those of its centre, in -1..1 along each side.
    """
    head = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** -np.arange(0, 1, 4 / head)
    centres = [2 * (np.arange(n) + 0.5) / n - 1 for n in (height, width)]
    grid = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(height * width, 2, 1)
    turned = np.tile((2 * np.pi * grid * frequencies).reshape(height * width, head // 2), 2)
    all_tokens = np.concatenate([np.zeros((1 + config.num_register_tokens, head)), turned])
    return np.cos(all_tokens).astype(np.float32), np.sin(all_tokens).astype(np.float32)


class DINOv3(nn.Module):
    """Vision transformer without a head.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms, rotations and softmax compute in float32.
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
        self.param("mask_token", zeros, (1, 1, d))  # of pre-training; it travels with the weights
        first = [
            self.param("cls_token", normal, (1, 1, d)),
            self.param("register_tokens", normal, (1, config.num_register_tokens, d)),
        ]
        x = jnp.concatenate(
            [*(jnp.broadcast_to(t[0].astype(dtype), (*batch, *t.shape[1:])) for t in first), x], axis=-2
        )
        x, _ = vit.layers(
            config.num_hidden_layers,
            (config.num_attention_heads, (config.query_bias, config.key_bias, config.value_bias, config.proj_bias)),
            _mlp(config, dtype),
            config.layer_norm_eps,
            dtype,
        )(x, tuple(map(jnp.asarray, angles(height, width, config))))
        return vit.norm(self, "norm", config.layer_norm_eps)(x)


def _mlp(config: Config, dtype: jnp.dtype) -> Callable[[], nn.Module]:
    width, act, bias = config.intermediate_size, config.hidden_act, config.mlp_bias
    if config.use_gated_mlp:
        return lambda: vit.GatedMLP(width, act, bias, False, dtype, name="mlp")
    return lambda: vit.MLP(width, act, bias, dtype, name="mlp")
