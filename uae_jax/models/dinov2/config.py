"""Configuration of DINOv2, under the field names of transformers' `Dinov2Config`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.vit import ACTIVATIONS

_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; defaults are ViT-L/14's. Positions are learnt for square images of `image_size` pixels.

    `num_register_tokens` of None is the release without registers, whose positions are interpolated by another rule.
    """

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    num_register_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"DINOv2 hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"DINOv2 width {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        for field in ("image_size", "patch_size"):
            if not isinstance(getattr(self, field), int):
                raise UserError(
                    f"DINOv2 {field} = {getattr(self, field)!r}: only square ones are known; give one number"
                )

    @property
    def grid(self) -> int:
        """Patches along one side of the position table."""
        return self.image_size // self.patch_size

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP; a gated one is two thirds as wide, rounded up to a multiple of 8."""
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads transformers' `config.json`; fields left out take transformers' defaults.

        Raises:
          UserError: it is another model's config, or of images or patches that are not square.
        """
        name = hf.get("model_type", "dinov2")
        if name not in _CLASSES:
            raise UserError(f"this is a config of model_type {name!r}, not {' or '.join(_CLASSES)}")
        defaults = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
        names = [f.name for f in dataclasses.fields(cls) if f.name != "num_register_tokens"]
        found = {field: hf.get(field, defaults.get(field, getattr(cls, field))) for field in names}
        registers = hf.get("num_register_tokens", 4) if name == "dinov2_with_registers" else None
        return cls(**found, num_register_tokens=registers)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        name = "dinov2" if self.num_register_tokens is None else "dinov2_with_registers"
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if self.num_register_tokens is not None:
            del values["use_mask_token"]
        return {"architectures": [_CLASSES[name]], "model_type": name, **values}
