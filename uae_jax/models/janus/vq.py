"""VQ-16, the image tokenizer of Janus: a convolutional encoder and decoder round a codebook of unit vectors.

Esser et al. 2021 (VQGAN) with the L2-normalised codebook of Yu et al. 2021; networks as transformers' `JanusVQVAE`
computes them. Nearest codes are found as the original repository finds them, by direction: transformers 5.23 compares
latents and codes without normalising them, and so gives an image other codes than those Janus was trained on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.errors import UserError
from uae_jax.models.dense import Dense
from uae_jax.models.vae.model import DownBlock, GroupNorm, MidBlock, UpBlock, conv

MODEL_TYPE = "janus_vqgan"
GROUPS = 32  # of the norms, in every release


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of a tokenizer and of the MLPs between its codes and a language model; defaults are transformers'.

    Attributes:
      embed_dim: of a code.
      num_embeddings: codes.
      latent_channels: what the encoder writes and the decoder reads; a linear map leads to embed_dim and back.
      in_channels: image channels read.
      out_channels: image channels drawn.
      base_channels: width at the resolution of the pixels, times the first of channel_multiplier.
      channel_multiplier: of widths at each resolution, from pixels to latents; each step halves the sides.
      num_res_blocks: residual blocks at each resolution of the encoder (the decoder has one more).
      num_patches: codes along one side of the images that a Janus model draws.
      projection_dim: width of the language model, to which codes are mapped.
      num_hidden_layers: linear layers of that map.
      hidden_act: its activation.
      image_token_embed_dim: width of the head that predicts codes.
    """

    embed_dim: int = 8
    num_embeddings: int = 16384
    latent_channels: int = 256
    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    num_patches: int = 32
    projection_dim: int = 2048
    num_hidden_layers: int = 2
    hidden_act: str = "gelu"
    image_token_embed_dim: int = 2048

    def __post_init__(self) -> None:
        for width in (self.base_channels, *self.widths):
            if width % GROUPS:
                raise UserError(f"JanusVQVAE width {width} does not divide into {GROUPS} groups")
        if self.num_res_blocks < 1:
            raise UserError(f"JanusVQVAE num_res_blocks is {self.num_res_blocks}: it must be at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each resolution, from pixels to latents."""
        return tuple(self.base_channels * m for m in self.channel_multiplier)

    @property
    def downsampling(self) -> int:
        """Pixels to a code, along one side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "VQConfig":
        """Reads transformers' `config.json` of a JanusVQVAE, or the `vq_config` in that of a Janus.

        Raises:
          UserError: it is another model's config, or one with two moments to a latent.
        """
        name = hf.get("model_type", MODEL_TYPE)
        if name != MODEL_TYPE:
            raise UserError(f"this is a config of model_type {name!r}, not {MODEL_TYPE!r}")
        if hf.get("double_latent"):
            raise UserError("JanusVQVAE double_latent is True: only the released tokenizers, without, are known")
        found = {field.name: hf[field.name] for field in dataclasses.fields(cls) if field.name in hf}
        if "channel_multiplier" in found:
            found["channel_multiplier"] = tuple(found["channel_multiplier"])
        return cls(**found)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        values = {**dataclasses.asdict(self), "channel_multiplier": list(self.channel_multiplier)}
        return {"architectures": ["JanusVQVAE"], "model_type": MODEL_TYPE, "double_latent": False, **values}


class Encoder(nn.Module):
    """Images [..., H, W, in_channels] -> [..., h, w, latent_channels]."""

    config: VQConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.widths
        x = conv(config.base_channels, self.dtype, "conv_in")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            layers = config.num_res_blocks
            x = DownBlock(width, layers, last, GROUPS, self.dtype, attention=last, name=f"down_{i}")(x)
        x = MidBlock(GROUPS, self.dtype, name="mid")(x)
        x = nn.silu(GroupNorm(GROUPS, self.dtype, name="norm_out")(x))
        return conv(config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """Latents [..., h, w, latent_channels] -> images [..., H, W, out_channels]."""

    config: VQConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, widths = self.config, self.config.widths[::-1]
        x = conv(widths[0], self.dtype, "conv_in")(x)
        x = MidBlock(GROUPS, self.dtype, name="mid")(x)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            layers = config.num_res_blocks + 1
            x = UpBlock(width, layers, last, GROUPS, self.dtype, attention=i == 0, name=f"up_{i}")(x)
        x = nn.silu(GroupNorm(GROUPS, self.dtype, name="norm_out")(x))
        return conv(config.out_channels, self.dtype, "conv_out")(x)


def directions(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, in float32; 0 stays 0."""
    x = x.astype(jnp.float32)
    # The root's gradient at 0 is infinite, so the smallest norm is set before it.
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-24))


class VQModel(nn.Module):
    """Images to codes, and codes to images. Top-level parameters: encoder, quant_conv, codebook, post_quant_conv,
    decoder.

    Attributes:
      config: sizes.
      dtype: compute dtype of the networks; parameters are float32, codes are compared in float32.
    """

    config: VQConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.quant_conv = Dense(config.embed_dim, dtype=self.dtype)
        self.codebook = self.param(
            "codebook", nn.initializers.normal(1.0), (config.num_embeddings, config.embed_dim), jnp.float32
        )
        self.post_quant_conv = Dense(config.latent_channels, dtype=self.dtype)
        self.decoder = Decoder(config, self.dtype)

    def encode(self, images: jax.Array) -> jax.Array:
        """Latents, not yet quantised.

        Args:
          images: [..., H, W, in_channels] in -1..1.

        Returns:
          [..., h, w, embed_dim] with h = H / downsampling; only their direction counts.
        """
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: jax.Array) -> jax.Array:
        """The codes int32 [..., h, w] nearest in direction to latents [..., h, w, embed_dim]; the first of equals."""
        # A TPU would otherwise multiply in bfloat16, too coarse to tell neighbours among 16384 codes.
        cosines = jnp.matmul(directions(latents), directions(self.codebook).T, precision=jax.lax.Precision.HIGHEST)
        return cosines.argmax(-1).astype(jnp.int32)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Unit vectors float32 [..., h, w, embed_dim] of codes [..., h, w]."""
        return directions(jnp.asarray(self.codebook)[codes])

    def decode_latents(self, latents: jax.Array) -> jax.Array:
        """Images [..., H, W, out_channels], about -1..1 and not clipped, of unit vectors [..., h, w, embed_dim]."""
        return self.decoder(self.post_quant_conv(latents))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Images [..., H, W, out_channels], about -1..1 and not clipped, of codes [..., h, w]."""
        return self.decode_latents(self.lookup(codes))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images through their codes and back: [..., H, W, in_channels] -> [..., H, W, out_channels]."""
        return self.decode(self.quantise(self.encode(images)))
