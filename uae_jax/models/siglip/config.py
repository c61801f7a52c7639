"""Configuration of SigLIP, and of SigLIP2 at a fixed size, under the field names of transformers' `SiglipConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.clip.config import TextConfig, VisionConfig

# What transformers 5.23 fills in where a published config leaves a field out.
_SHARED: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_VISION: dict[str, Any] = {**_SHARED, "num_channels": 3, "image_size": 224, "patch_size": 16}
_TEXT: dict[str, Any] = {**_SHARED, "vocab_size": 32000, "max_position_embeddings": 64}


@dataclasses.dataclass(frozen=True)
class Config:
    """The image tower and, in a `SiglipModel`, the text tower with the width of its head."""

    vision: VisionConfig
    text: TextConfig | None = None
    projection_size: int | None = None

    def __post_init__(self) -> None:
        for field in ("image_size", "patch_size"):
            if not isinstance(getattr(self.vision, field), int):
                raise UserError(f"SigLIP {field}: only square ones are known; give one number")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads transformers' `config.json` of a SiglipModel or SiglipVisionModel.

        Raises:
          UserError: it is another model's config (SigLIP2's NaFlex among them), or has no pooling head.
        """
        name = hf.get("model_type", "siglip")
        if name not in ("siglip", "siglip_vision_model"):
            raise UserError(f"this is a config of model_type {name!r}, not 'siglip' or 'siglip_vision_model'")
        vision = hf if name == "siglip_vision_model" else hf.get("vision_config") or {}
        if not vision.get("vision_use_head", True):
            raise UserError("SigLIP vision_use_head is False: a tower without its pooling head has no image embedding")
        sizes = VisionConfig(**{field: vision.get(field, default) for field, default in _VISION.items()})
        if name == "siglip_vision_model":
            return cls(sizes)
        text = hf.get("text_config") or {}
        found = TextConfig(**{field: text.get(field, default) for field, default in _TEXT.items()})
        return cls(sizes, found, text.get("projection_size") or found.hidden_size)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        vision = {"model_type": "siglip_vision_model", **dataclasses.asdict(self.vision)}
        if self.text is None:
            return {"architectures": ["SiglipVisionModel"], **vision}
        text = {field: getattr(self.text, field) for field in _TEXT}
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": vision,
            "text_config": {"model_type": "siglip_text_model", "projection_size": self.projection_size, **text},
        }
