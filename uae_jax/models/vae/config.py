"""Configuration of the image VAE, under the field names of diffusers' `AutoencoderKL`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError

CLASS_NAME = "AutoencoderKL"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one VAE; defaults are those of SD3.

    Attributes:
      in_channels: image channels read.
      out_channels: image channels drawn.
      block_out_channels: width at each resolution, from pixels to latents; each step halves the sides.
      layers_per_block: residual blocks at each resolution of the encoder (the decoder has one more).
      latent_channels: channels of a latent.
      norm_num_groups: groups of the norms.
      scaling_factor: a decoder of latents is trained on (latent - shift_factor) * scaling_factor.
      shift_factor: see above.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(f"VAE width {width} does not divide into {self.norm_num_groups} groups")

    @property
    def downsampling(self) -> int:
        """Pixels to a latent, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def _architecture(self) -> dict[str, Any]:
        """What diffusers can vary and this implementation cannot."""
        n = len(self.block_out_channels)
        return {
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * n,
            "up_block_types": ["UpDecoderBlock2D"] * n,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
            "latents_mean": None,
            "latents_std": None,
        }

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads diffusers' `config.json` (keys beginning with `_` are its bookkeeping).

        Raises:
          UserError: it is another model's, a field is missing or unknown, or asks for an architecture other than that
            of SD3 and FLUX (such as SD 1.5's, with convolutions around the latent).
        """
        name = hf.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise UserError(f"this is a {name} config, not an {CLASS_NAME} one")
        # Neither changes a tensor or a number: tiling starts at sample_size, and the compute dtype is the caller's.
        ignored = {"sample_size", "force_upcast"}
        values = {key: value for key, value in hf.items() if not key.startswith("_") and key not in ignored}
        fields = [f.name for f in dataclasses.fields(cls)]
        missing = [field for field in fields if field not in values]
        if missing:
            raise UserError(f"{CLASS_NAME} config: missing fields {missing}")
        found = {field: values.pop(field) for field in fields}
        found["block_out_channels"] = tuple(found["block_out_channels"])
        found["shift_factor"] = found["shift_factor"] or 0.0
        config = cls(**found)
        # Left out, these are diffusers' defaults: the convolutions around the latent are on.
        values = {"use_quant_conv": True, "use_post_quant_conv": True, **values}
        supported = config._architecture()
        wrong = []
        for key, value in values.items():
            value = list(value) if isinstance(value, tuple) else value
            if key not in supported or supported[key] != value:
                wrong.append(f"{key}={value}")
        if wrong:
            raise UserError(f"{CLASS_NAME} config: not supported: {', '.join(wrong)}")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that diffusers reads."""
        values = {**dataclasses.asdict(self), "block_out_channels": list(self.block_out_channels)}
        return {"_class_name": CLASS_NAME, **values, **self._architecture()}
