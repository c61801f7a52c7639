"""CLIP (Radford et al. 2021), as transformers' `CLIPModel` computes it."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.errors import UserError
from uae_jax.models.attention import attention
from uae_jax.models.clip.config import Config, TextConfig, TextModelConfig, VisionConfig
from uae_jax.models.dense import Dense


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of a `hidden_act` name."""
    return {
        "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
        "gelu": lambda x: nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    }[name]


class Layer(nn.Module):
    """Pre-norm transformer layer: [..., t, d] -> [..., t, d]; mask bool, broadcastable to [..., t, t].

    With `inputs` the second output, which a scan stacks, is the layer's input.
    """

    config: VisionConfig | TextConfig
    dtype: jnp.dtype
    inputs: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        config, before = self.config, x if self.inputs else None

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=self.dtype, name=name)

        y = norm("layer_norm1")(x)
        heads = (*y.shape[:-1], config.num_attention_heads, -1)
        q, k, v = (
            Dense(config.hidden_size, dtype=self.dtype, name=name)(y).reshape(heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = attention(q, k, v, mask).reshape(x.shape)
        x = x + Dense(config.hidden_size, dtype=self.dtype, name="out_proj")(y)
        y = Dense(config.intermediate_size, dtype=self.dtype, name="fc1")(norm("layer_norm2")(x))
        y = activation(config.hidden_act)(y)
        return x + Dense(config.hidden_size, dtype=self.dtype, name="fc2")(y), before


def encoder(config: VisionConfig | TextConfig, dtype: jnp.dtype, inputs: bool = False) -> nn.Module:
    """The tower's layers, scanned: their parameters have a leading layer axis."""
    scanned = nn.scan(
        Layer,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_hidden_layers,
    )
    return scanned(config, dtype, inputs, name="layers")


class VisionTower(nn.Module):
    """Image tower: pixels [..., H, W, C] -> (last_hidden [..., 1 + n, d], pooled [..., d])."""

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, dtype = self.config, self.dtype
        *batch, height, width, channels = pixels.shape
        if (height, width, channels) != (config.image_size, config.image_size, config.num_channels):
            raise UserError(
                f"this CLIP reads images of {config.image_size}x{config.image_size}x{config.num_channels}, "
                f"not {height}x{width}x{channels}"
            )
        p, side = config.patch_size, config.image_size // config.patch_size
        # The convolution of the reference has no padding: pixels past the last whole patch are not read.
        patches = pixels[..., : side * p, : side * p, :].reshape(*batch, side, p, side, p, channels)
        patches = jnp.einsum("...hpwqc->...hwcpq", patches).reshape(*batch, config.num_patches, channels * p * p)
        x = Dense(config.hidden_size, use_bias=False, dtype=dtype, name="patch_embedding")(patches)

        normal = nn.initializers.normal(0.02)
        first = self.param("class_embedding", normal, (config.hidden_size,)).astype(dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (*batch, 1, config.hidden_size)), x], axis=-2)
        x = x + self.param("position_embedding", normal, (1 + config.num_patches, config.hidden_size)).astype(dtype)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=dtype, name=name)

        x, _ = encoder(config, dtype)(norm("pre_layernorm")(x), None)
        return x, norm("post_layernorm")(x[..., 0, :])


class TextTower(nn.Module):
    """Text tower: ids [..., t] -> (states before the last layer [..., t, d], pooled after the final norm [..., d])."""

    config: TextConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        config, dtype = self.config, self.dtype
        t = tokens.shape[-1]
        if t > config.max_position_embeddings:
            raise UserError(f"this CLIP reads at most {config.max_position_embeddings} tokens, not {t}")
        normal = nn.initializers.normal(0.02)
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, embedding_init=normal, name="token_embedding"
        )
        positions = self.param("position_embedding", normal, (config.max_position_embeddings, config.hidden_size))
        x = embed(tokens) + positions[:t].astype(dtype)
        # Padding stands behind the end token: the causal mask alone hides it from what is pooled.
        x, inputs = encoder(config, dtype, inputs=True)(x, jnp.tril(jnp.ones((t, t), bool)))
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, dtype=dtype, name="final_layer_norm")(
            x
        )
        end = jnp.argmax(tokens if config.eos_token_id == 2 else tokens == config.eos_token_id, axis=-1)
        return inputs[-1], jnp.take_along_axis(x, end[..., None, None], axis=-2)[..., 0, :]


class CLIP(nn.Module):
    """Image and text encoders with a shared space.

    Top-level parameters: vision, text, visual_projection, text_projection, logit_scale. Features are not normalised.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision = VisionTower(self.config.vision, self.dtype)
        self.text = TextTower(self.config.text, self.dtype)
        self.visual_projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)
        self.text_projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.config.logit_scale_init_value), ())

    def vision_hidden(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states of images.

        Args:
          pixels: [..., image_size, image_size, 3], normalised with CLIP's mean and standard deviation.

        Returns:
          last_hidden [..., 1 + n, d], class token first, before any final norm; pooled [..., d], that token after it.

        Raises:
          UserError: the images are of another size.
        """
        return self.vision(pixels)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """Un-normalised image embedding: pixels as in `vision_hidden` -> [..., projection_dim]."""
        return self.visual_projection(self.vision(pixels)[1])

    def text_features(self, tokens: jax.Array) -> jax.Array:
        """Un-normalised text embedding: ids [..., t], each row holding an end token -> [..., projection_dim].

        Raises:
          UserError: there are more tokens than positions.
        """
        return self.text_projection(self.text(tokens)[1])

    def __call__(self, pixels: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(image features, text features, scale of their cosine as a logit, a float32 scalar)."""
        return self.image_features(pixels), self.text_features(tokens), jnp.exp(self.logit_scale)


class CLIPText(nn.Module):
    """The text tower alone, as decoders use it (transformers' `CLIPTextModel`, or `CLIPTextModelWithProjection`).

    Top-level parameters: text, and text_projection with a projection; both as in `CLIP`.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: TextModelConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States of all tokens and of the text.

        Args:
          tokens: ids [..., t], each row holding an end token; what follows it is not seen.

        Returns:
          hidden [..., t, d], before the last layer and any final norm (transformers' `hidden_states[-2]`, which SD3
          reads); pooled [..., projection_dim], or [..., d] without a projection.

        Raises:
          UserError: there are more tokens than positions.
        """
        hidden, pooled = TextTower(self.config.text, self.dtype, name="text")(tokens)
        if self.config.projection_dim is not None:
            projection = Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, name="text_projection")
            pooled = projection(pooled)
        return hidden, pooled
