"""Sizes of Janus and Janus-Pro, read from and written to transformers' `config.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from uae_jax.errors import UserError
from uae_jax.models.janus.vq import VQConfig
from uae_jax.models.qwen2_5_vl.config import TextConfig

ARCHITECTURE = "janus"

# Janus-Pro's special tokens: the field of `Config`, the tokenizer's name and the id there.
TOKENS = {
    "image_token_id": ("<image_placeholder>", 100581),
    "boi_token_id": ("<begin_of_image>", 100016),
    "eoi_token_id": ("<end_of_image>", 100593),
    "bos_token_id": ("<｜begin▁of▁sentence｜>", 100000),
    "eos_token_id": ("<｜end▁of▁sentence｜>", 100001),
    "pad_token_id": ("<｜▁pad▁｜>", 100015),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The understanding tower, on square images; defaults are SigLIP-L/16's at 384 pixels."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 16
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6

    @property
    def intermediate_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Config:
    """The parts, the depth of the MLP between tower and language model, and the ids of the special tokens."""

    text: TextConfig
    vision: VisionConfig
    vq: VQConfig
    aligner_depth: int = 2
    image_token_id: int = TOKENS["image_token_id"][1]  # placeholder of one image feature
    boi_token_id: int = TOKENS["boi_token_id"][1]  # begin of image
    eoi_token_id: int = TOKENS["eoi_token_id"][1]  # end of image
    bos_token_id: int = TOKENS["bos_token_id"][1]
    eos_token_id: int = TOKENS["eos_token_id"][1]
    pad_token_id: int = TOKENS["pad_token_id"][1]

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Config":
        """Parses transformers' `config.json` of a `JanusForConditionalGeneration`.

        Special tokens that it does not name are Janus-Pro's; see `with_tokens`.

        Raises:
          UserError: another architecture, a missing field, or a setting this implementation does not have.
        """
        if values.get("model_type") != ARCHITECTURE:
            raise UserError(f"config.json: model_type is {values.get('model_type')!r}, expected {ARCHITECTURE!r}")
        text, vision, vq = (_get(values, f"{name}_config") for name in ("text", "vision", "vq"))
        # Files from before transformers 5 leave it out, and are not tied.
        tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        named = {**text, **{name: values[name] for name in TOKENS if values.get(name) is not None}}
        tower = _vision(vision)
        config = cls(
            text=llama({**text, "tie_word_embeddings": tied}, "text_config."),
            vision=tower,
            vq=VQConfig.from_hf({**vq, "num_patches": tower.image_size // tower.patch_size}),
            aligner_depth=vision.get("depth", 2),
            **{name: named[name] for name in TOKENS if named.get(name) is not None},
        )
        supported(config.vq.hidden_act == "gelu", "vq_config.hidden_act", config.vq.hidden_act)
        width = config.text.hidden_size
        for name, found in (
            ("vision_config.projection_dim", vision.get("projection_dim", 2048)),
            ("vq_config.projection_dim", config.vq.projection_dim),
            ("vq_config.image_token_embed_dim", config.vq.image_token_embed_dim),
        ):
            supported(found == width, f"{name}, with a text_config.hidden_size of {width},", found)
        return config

    def to_hf(self) -> dict[str, Any]:
        """`config.json` as transformers writes it, with the ids of the special tokens besides."""
        text, vision, width = self.text, self.vision, self.text.hidden_size
        return {
            "architectures": ["JanusForConditionalGeneration"],
            "model_type": ARCHITECTURE,
            "tie_word_embeddings": text.tie_word_embeddings,
            **{name: getattr(self, name) for name in TOKENS},
            "text_config": {
                "model_type": "llama",
                "vocab_size": text.vocab_size,
                "hidden_size": width,
                "intermediate_size": text.intermediate_size,
                "num_hidden_layers": text.num_layers,
                "num_attention_heads": text.num_heads,
                "num_key_value_heads": text.num_kv_heads,
                "head_dim": text.head_dim,
                "hidden_act": "silu",
                "attention_bias": False,
                "max_position_embeddings": text.max_position_embeddings,
                "rms_norm_eps": text.rms_norm_eps,
                "rope_theta": text.rope_theta,
                "tie_word_embeddings": text.tie_word_embeddings,
                **{name: getattr(self, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            },
            "vision_config": {
                "model_type": "janus_vision_model",
                **dataclasses.asdict(vision),
                "hidden_act": "gelu",
                "projection_dim": width,
                "depth": self.aligner_depth,
                "num_image_tokens": vision.num_patches,
            },
            "vq_config": self.vq.to_hf(),
        }

    def with_tokens(self, token_to_id: Callable[[str], int | None]) -> "Config":
        """The config with the ids that a tokenizer gives Janus' special tokens, where it has them."""
        ids: dict[str, Any] = {field: token_to_id(name) for field, (name, _) in TOKENS.items()}
        return dataclasses.replace(self, **{field: found for field, found in ids.items() if found is not None})


def supported(condition: bool, name: str, found: Any) -> None:
    """Raises UserError unless `condition`."""
    if not condition:
        raise UserError(f"config.json: {name} = {found!r} is not supported")


def _get(values: Mapping[str, Any], name: str, where: str = "") -> Any:
    if values.get(name) is None:
        raise UserError(f"config.json: {where}{name} is missing")
    return values[name]


def llama(values: Mapping[str, Any], where: str) -> TextConfig:
    """The language model of a `LlamaConfig`; what it leaves out is transformers' default, as in the hub's files."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads, width = _get(values, "num_attention_heads", where), _get(values, "hidden_size", where)
    supported(values.get("model_type", "llama") == "llama", f"{where}model_type", values.get("model_type"))
    supported(kind == "default", f"{where}rope type", kind)
    supported(values.get("hidden_act", "silu") == "silu", f"{where}hidden_act", values.get("hidden_act"))
    supported(not values.get("attention_bias"), f"{where}attention_bias", True)
    supported(not values.get("mlp_bias"), f"{where}mlp_bias", True)
    head_dim = values.get("head_dim") or width // heads
    supported(head_dim * heads == width, f"{where}head_dim", head_dim)
    return TextConfig(
        vocab_size=_get(values, "vocab_size", where),
        hidden_size=width,
        intermediate_size=_get(values, "intermediate_size", where),
        num_layers=_get(values, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        rope_theta=rope.get("rope_theta") or values.get("rope_theta") or 10000.0,
        mrope_section=(head_dim // 2,),
        tie_word_embeddings=values["tie_word_embeddings"],
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        attention_bias=False,
    )


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    where = "vision_config."
    fields = dataclasses.fields(VisionConfig)
    config = VisionConfig(**{field.name: values.get(field.name, field.default) for field in fields})
    for name in ("image_size", "patch_size"):
        supported(isinstance(getattr(config, name), int), f"{where}{name}", getattr(config, name))
    supported(values.get("hidden_act", "gelu") == "gelu", f"{where}hidden_act", values.get("hidden_act"))
    supported(values.get("attention_bias", True), f"{where}attention_bias", False)
    supported(not values.get("use_qk_norm"), f"{where}use_qk_norm", True)
    tokens = values.get("num_image_tokens", config.num_patches)
    supported(tokens == config.num_patches, f"{where}num_image_tokens", tokens)
    return config
