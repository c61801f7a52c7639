"""Configuration of the FLUX.1 MM-DiT, under the field names of diffusers' `FluxTransformer2DModel`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.mmdit import diffusers_fields

CLASS_NAME = "FluxTransformer2DModel"
# FLUX's pipeline packs squares of this side of the VAE's latents into tokens before its transformer sees them.
PACK = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one MM-DiT; defaults are those that the published configs leave out.

    Attributes:
      in_channels: channels of a token: PACK**2 times those of a latent.
      num_layers: double blocks, whose text and image have their own weights.
      num_single_layers: single blocks, in which they share them.
      attention_head_dim: width of a head.
      num_attention_heads: heads; the model is `num_attention_heads * attention_head_dim` wide.
      joint_attention_dim: width of the text states.
      pooled_projection_dim: width of the pooled text vector.
      guidance_embeds: takes the guidance scale as an input (dev); without, it is distilled into the weights (schnell).
      out_channels: channels of a token's predicted velocity; None means `in_channels`.
      axes_dims_rope: channels of a head that rotate with each of the three position ids; they make up the head.
      patch_size: 1, because tokens are packed before the transformer.
    """

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    out_channels: int | None = None
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(axis % 2 for axis in axes):
            raise UserError(
                f"axes_dims_rope {axes}: three even widths must make up a head of {self.attention_head_dim} channels"
            )
        if self.patch_size != 1:
            raise UserError(f"patch_size {self.patch_size} is not supported: FLUX packs latents before its transformer")
        if self.in_channels % PACK**2 or self.token_out % PACK**2:
            raise UserError(
                f"in_channels {self.in_channels} and out_channels {self.token_out} must be multiples of {PACK**2}: "
                f"a token holds {PACK}x{PACK} latent pixels"
            )
        if min(self.num_layers, self.num_single_layers) < 1:
            raise UserError(
                f"num_layers {self.num_layers} and num_single_layers {self.num_single_layers} must be at least 1"
            )

    @property
    def width(self) -> int:
        """Width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def token_out(self) -> int:
        """Channels of a token's predicted velocity."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads diffusers' `config.json` (keys beginning with `_` are its bookkeeping).

        Raises:
          UserError: it is another model's, or a field is missing, unknown or unsupported.
        """
        values = diffusers_fields(cls, CLASS_NAME, hf)
        if "axes_dims_rope" in values:
            values["axes_dims_rope"] = tuple(values["axes_dims_rope"])
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that diffusers reads."""
        values = dataclasses.asdict(self)
        return {"_class_name": CLASS_NAME, **values, "axes_dims_rope": list(self.axes_dims_rope)}
