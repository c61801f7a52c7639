"""Configuration of DINOv3's vision transformers, under the field names of transformers' `DINOv3ViTConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.vit import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes; defaults are ViT-L/16's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    num_register_tokens: int = 4

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"DINOv3 hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise UserError(
                f"DINOv3 width {self.hidden_size} does not divide into {self.num_attention_heads} heads "
                "of a multiple of 4"
            )
        for field in ("image_size", "patch_size"):
            if not isinstance(getattr(self, field), int):
                raise UserError(
                    f"DINOv3 {field} = {getattr(self, field)!r}: only square ones are known; give one number"
                )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads transformers' `config.json`; fields left out take transformers' defaults.

        Raises:
          UserError: it is another model's config, or of images or patches that are not square.
        """
        name = hf.get("model_type", "dinov3_vit")
        if name != "dinov3_vit":
            raise UserError(f"this is a config of model_type {name!r}, not 'dinov3_vit'")
        defaults = {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_register_tokens": 0,
        }
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(**{field: hf.get(field, defaults.get(field, getattr(cls, field))) for field in names})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {"architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit", **dataclasses.asdict(self)}
