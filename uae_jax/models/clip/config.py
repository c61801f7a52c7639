"""Configuration of CLIP, under the field names of transformers' `CLIPConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")


def _check(config: "VisionConfig | TextConfig") -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"CLIP hidden_act {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(f"CLIP width {config.hidden_size} does not divide into {config.num_attention_heads} heads")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower (square images of `image_size` pixels); defaults are ViT-L/14's."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; defaults are ViT-L/14's.

    An `eos_token_id` of 2 is the mistake of the published configs, not a token: the text is then read off where the
    token id is highest, elsewhere at the first `eos_token_id`.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        _check(self)


# What transformers 5.23 fills in where a published config leaves a field out (they hold differences only).
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
_TEXT_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_SHARED_DEFAULTS: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


@dataclasses.dataclass(frozen=True)
class Config:
    """The two towers and the width of the space they share."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = 768
    logit_scale_init_value: float = 2.6592

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads transformers' `config.json`; fields left out take transformers' defaults.

        Raises:
          UserError: it is another model's config, or a tower's is missing.
        """
        name = hf.get("model_type", "clip")
        if name != "clip":
            raise UserError(f"this is a config of model_type {name!r}, not 'clip'")
        # Configs written by early transformers hold complete towers under *_config_dict, which take precedence.
        towers = []
        for key, defaults in (("vision_config", _VISION_DEFAULTS), ("text_config", _TEXT_DEFAULTS)):
            found = {**(hf.get(key) or {}), **(hf.get(f"{key}_dict") or {})}
            if not found:
                raise UserError(f"CLIP config: {key} is missing")
            defaults = {**_SHARED_DEFAULTS, **defaults}
            towers.append({field: found.get(field, default) for field, default in defaults.items()})
        return cls(
            VisionConfig(**towers[0]),
            TextConfig(**towers[1]),
            hf.get("projection_dim", 512),
            hf.get("logit_scale_init_value", 2.6592),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.projection_dim,
            "logit_scale_init_value": self.logit_scale_init_value,
            "vision_config": {
                "model_type": "clip_vision_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.vision),
            },
            "text_config": {
                "model_type": "clip_text_model",
                "projection_dim": self.projection_dim,
                **dataclasses.asdict(self.text),
            },
        }


@dataclasses.dataclass(frozen=True)
class TextModelConfig:
    """A text tower on its own, with a projection (SD3's encoders) or, where it is None, without (FLUX's)."""

    text: TextConfig
    projection_dim: int | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "TextModelConfig":
        """Reads transformers' `config.json`; fields left out take transformers' defaults.

        Raises:
          UserError: it is another model's config.
        """
        name = (hf.get("architectures") or ["CLIPTextModelWithProjection"])[0]
        if name not in _TEXT_MODELS:
            raise UserError(f"this is a {name} config, not one of {', '.join(_TEXT_MODELS)}")
        defaults = {**_SHARED_DEFAULTS, **_TEXT_DEFAULTS}
        text = TextConfig(**{field: hf.get(field, default) for field, default in defaults.items()})
        return cls(text, hf.get("projection_dim", 512) if name == "CLIPTextModelWithProjection" else None)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        projected = self.projection_dim is not None
        return {
            "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
            "model_type": "clip_text_model",
            **({"projection_dim": self.projection_dim} if projected else {}),
            **dataclasses.asdict(self.text),
        }
