"""Configuration of the SD3 / SD3.5 MM-DiT, under the field names of diffusers' `SD3Transformer2DModel`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.mmdit import diffusers_fields

CLASS_NAME = "SD3Transformer2DModel"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one MM-DiT.

    Attributes:
      sample_size: latent side length the position table is scaled to (`sample_size / patch_size` grid steps span it).
      patch_size: side of a patch, in latent pixels.
      in_channels: latent channels read.
      num_layers: joint blocks, the last of which does not update the text.
      attention_head_dim: width of a head.
      num_attention_heads: heads; the model is `num_attention_heads * attention_head_dim` wide.
      joint_attention_dim: width of the text states.
      caption_projection_dim: width they are projected to; the width of the model.
      pooled_projection_dim: width of the pooled text vector.
      out_channels: channels of the predicted velocity.
      pos_embed_max_size: side of the position table, in patches; smaller latents take its centre.
      dual_attention_layers: blocks with a second, image-only attention; the first ones, (0, 1, ...).
      qk_norm: "rms_norm" or None.
    """

    sample_size: int
    patch_size: int
    in_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    caption_projection_dim: int
    pooled_projection_dim: int
    out_channels: int
    pos_embed_max_size: int
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        if self.dual_attention_layers != tuple(range(self.num_dual)) or self.num_dual >= self.num_layers:
            raise UserError(
                f"dual_attention_layers {self.dual_attention_layers}: only the first blocks (0, 1, ...), without "
                f"the last of {self.num_layers}, can have dual attention"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise UserError(f"qk_norm {self.qk_norm!r} is not supported: use 'rms_norm' or None")
        if self.caption_projection_dim != self.width:
            raise UserError(
                f"caption_projection_dim {self.caption_projection_dim} is not the width of the model "
                f"({self.num_attention_heads} heads of {self.attention_head_dim})"
            )
        if self.width % 4:
            raise UserError(f"a width of {self.width} has no 2-D sine-cosine positions: it must be a multiple of 4")

    @property
    def width(self) -> int:
        """Width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_dual(self) -> int:
        """Blocks with dual attention."""
        return len(self.dual_attention_layers)

    @property
    def num_plain(self) -> int:
        """Blocks between the dual ones and the last."""
        return self.num_layers - self.num_dual - 1

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads diffusers' `config.json` (keys beginning with `_` are its bookkeeping).

        Raises:
          UserError: it is another model's, or a field is missing or unknown.
        """
        values = diffusers_fields(cls, CLASS_NAME, hf)
        if values["out_channels"] is None:
            values["out_channels"] = values["in_channels"]
        values["dual_attention_layers"] = tuple(values.get("dual_attention_layers") or ())
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that diffusers reads."""
        values = dataclasses.asdict(self)
        return {"_class_name": CLASS_NAME, **values, "dual_attention_layers": list(self.dual_attention_layers)}
