"""The convolutional VAE of SD3 and FLUX (Rombach et al. 2022), as diffusers' `AutoencoderKL` computes it.

Modules carry the names of the checkpoint (`down_blocks_0/resnets_1/conv2`). Leading axes are free; only XLA's
convolution, which knows one batch axis, sees them merged.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.vae.config import Config


class GroupNorm(nn.Module):
    """Group norm of [..., H, W, C] over H, W and the channels of a group, in float32, one image at a time.

    (flax's own takes the second axis of [b, g, H, W, C] for a spatial one.)
    """

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, channels // self.groups)
        y = y - y.mean((-4, -3, -1), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((-4, -3, -1), keepdims=True) + 1e-6)
        return (y.reshape(x.shape) * scale + bias).astype(self.dtype)


def conv(features: int, dtype: jnp.dtype, name: str) -> nn.Conv:
    """A 3 x 3 convolution that keeps the sides."""
    return nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a residual: [..., H, W, C] -> [..., H, W, width]."""

    width: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        y = conv(self.width, self.dtype, "conv1")(y)
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y))
        y = conv(self.width, self.dtype, "conv2")(y)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + y


class AttentionBlock(nn.Module):
    """One head of attention among all pixels, and a residual: [..., H, W, C] -> [..., H, W, C]."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        *batch, height, width, channels = x.shape
        y = GroupNorm(self.groups, self.dtype, name="group_norm")(x).reshape(*batch, height * width, 1, channels)
        q, k, v = (Dense(channels, dtype=self.dtype, name=name)(y) for name in ("to_q", "to_k", "to_v"))
        return x + Dense(channels, dtype=self.dtype, name="to_out")(attention(q, k, v)).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the latents' resolution."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
        x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)


class DownBlock(nn.Module):
    """Residual blocks at one resolution, then half of it: [..., H, W, C] -> [..., H / 2, W / 2, width]."""

    width: int
    layers: int
    last: bool
    groups: int
    dtype: jnp.dtype
    attention: bool = False  # after each residual block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
            if self.attention:
                x = AttentionBlock(self.groups, self.dtype, name=f"attentions_{i}")(x)
        if self.last:
            return x
        # Padded below and to the right only.
        padding = ((0, 1), (0, 1))
        return nn.Conv(self.width, (3, 3), strides=2, padding=padding, dtype=self.dtype, name="downsamplers_0")(x)


class UpBlock(nn.Module):
    """Residual blocks at one resolution, then twice it: [..., H, W, C] -> [..., 2 H, 2 W, width]."""

    width: int
    layers: int
    last: bool
    groups: int
    dtype: jnp.dtype
    attention: bool = False  # after each residual block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.width, self.groups, self.dtype, name=f"resnets_{i}")(x)
            if self.attention:
                x = AttentionBlock(self.groups, self.dtype, name=f"attentions_{i}")(x)
        if self.last:
            return x
        return conv(self.width, self.dtype, "upsamplers_0")(x.repeat(2, axis=-3).repeat(2, axis=-2))


class Encoder(nn.Module):
    """Images [..., H, W, in_channels] -> moments [..., h, w, 2 latent_channels]."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        widths = config.block_out_channels
        x = conv(widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = DownBlock(width, config.layers_per_block, last, groups, self.dtype, name=f"down_blocks_{i}")(x)
        x = MidBlock(groups, self.dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="conv_norm_out")(x))
        return conv(2 * config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents [..., h, w, latent_channels] -> images [..., H, W, out_channels]."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        widths = config.block_out_channels[::-1]
        x = conv(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(groups, self.dtype, name="mid_block")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            x = UpBlock(width, config.layers_per_block + 1, last, groups, self.dtype, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="conv_norm_out")(x))
        return conv(config.out_channels, self.dtype, "conv_out")(x)


def gaussian(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance (clipped to -30..20) of latents from the encoder's output."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


class AutoencoderKL(nn.Module):
    """Images to Gaussians over latents, and latents to images.

    Neither method applies `scaling_factor` and `shift_factor`: what a flow model sees is
    (latent - shift_factor) * scaling_factor. Top-level parameters: encoder, decoder.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms and softmax compute in float32.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latents.

        Args:
          images: [..., H, W, in_channels] in -1..1.

        Returns:
          mean, logvar (clipped to -30..20): [..., H / downsampling, W / downsampling, latent_channels].
        """
        return gaussian(self.moments(images))

    def moments(self, images: jax.Array) -> jax.Array:
        """What `gaussian` splits: images as in `encode` -> [..., h, w, 2 latent_channels]."""
        return self.encoder(images)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images [..., H, W, out_channels], about -1..1 and not clipped, of latents [..., h, w, latent_channels]."""
        return self.decoder(latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images through the mean of their latents and back: [..., H, W, in_channels] -> [..., H, W, out_channels]."""
        return self.decode(self.encode(images)[0])
