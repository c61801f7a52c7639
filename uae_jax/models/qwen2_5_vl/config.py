"""Sizes of Qwen2.5-VL, read from and written to its Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError

ARCHITECTURE = "qwen2_5_vl"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `window_size` is in pixels; `fullatt_block_indexes` names the blocks that see a whole frame."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    tokens_per_second: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches that become one token of the language model."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Merged tokens along one side of an attention window."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def period(self) -> int:
        """k, when every k-th block, and only that, has full attention.

        Raises:
          UserError: the full blocks do not repeat so (blocks are scanned in periods of k - 1 windowed and 1 full).
        """
        k = min(self.fullatt_block_indexes, default=self.depth) + 1
        if self.depth % k or sorted(self.fullatt_block_indexes) != list(range(k - 1, self.depth, k)):
            raise UserError(
                f"fullatt_block_indexes {list(self.fullatt_block_indexes)} of {self.depth} blocks are not every k-th "
                "block up to the last; only that pattern is supported"
            )
        return k


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model. `mrope_section` splits half a head's frequencies over time, height and width.

    One section and no `attention_bias` make it Llama, with one axis of positions.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 128000
    attention_bias: bool = True  # of query, key and value

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class Config:
    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_id: int
    pad_token_id: int
    video_token_id: int = 151656

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Config":
        """Parses `config.json`, in the hub's flat layout or transformers v5's nested one.

        Where no padding token is named, it is the one Qwen pads with: `<|endoftext|>`, listed as `bos_token_id`.

        Raises:
          UserError: another architecture, a missing field, or a setting this implementation does not have.
        """
        if values.get("model_type") != ARCHITECTURE:
            raise UserError(f"config.json: model_type is {values.get('model_type')!r}, expected {ARCHITECTURE!r}")
        nested = {key: value for key, value in (values.get("text_config") or {}).items() if value is not None}
        text = {**values, **nested}
        # v5 keeps `tie_word_embeddings` at the root, 4.5x in the text part; a tied model says so in one of them.
        tied = bool(values.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))
        eos = _get(text, "eos_token_id")
        eos = eos[0] if isinstance(eos, list | tuple) else eos
        pads = (text.get("pad_token_id"), text.get("bos_token_id"), eos)
        return cls(
            vision=_vision(_get(values, "vision_config")),
            text=_text({**text, "tie_word_embeddings": tied}),
            **{name: _get(values, name) for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")},
            eos_token_id=eos,
            pad_token_id=next(token for token in pads if token is not None),
            video_token_id=values.get("video_token_id", cls.video_token_id),
        )

    def to_hf(self) -> dict[str, Any]:
        """`config.json` in the hub's flat layout, which every release of transformers reads."""
        vision, text = self.vision, self.text
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": ARCHITECTURE,
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": text.max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
            "use_sliding_window": False,
            "tie_word_embeddings": text.tie_word_embeddings,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "bos_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "vision_config": {
                **dataclasses.asdict(vision),
                "fullatt_block_indexes": list(vision.fullatt_block_indexes),
                "hidden_act": "silu",
                "in_chans": vision.in_channels,  # the hub's older spelling
                "model_type": ARCHITECTURE,
            },
        }


def _get(values: Mapping[str, Any], name: str, where: str = "") -> Any:
    if values.get(name) is None:
        raise UserError(f"config.json: {where}{name} is missing")
    return values[name]


def _supported(condition: bool, name: str, found: Any) -> None:
    if not condition:
        raise UserError(f"config.json: {name} = {found!r} is not supported")


def _vision(values: Mapping[str, Any]) -> VisionConfig:
    where = "vision_config."
    activation = values.get("hidden_act", "silu")
    _supported(activation == "silu", f"{where}hidden_act", activation)
    return VisionConfig(
        depth=_get(values, "depth", where),
        hidden_size=_get(values, "hidden_size", where),
        intermediate_size=_get(values, "intermediate_size", where),
        num_heads=_get(values, "num_heads", where),
        patch_size=_get(values, "patch_size", where),
        window_size=_get(values, "window_size", where),
        fullatt_block_indexes=tuple(_get(values, "fullatt_block_indexes", where)),
        out_hidden_size=_get(values, "out_hidden_size", where),
        temporal_patch_size=_get(values, "temporal_patch_size", where),
        spatial_merge_size=_get(values, "spatial_merge_size", where),
        in_channels=values.get("in_channels", values.get("in_chans", 3)),
        tokens_per_second=values.get("tokens_per_second", 2),
    )


def _text(values: Mapping[str, Any]) -> TextConfig:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    activation = values.get("hidden_act", "silu")
    _supported(kind in ("default", "mrope"), "rope type", kind)
    _supported(not values.get("use_sliding_window"), "use_sliding_window", True)
    _supported(activation == "silu", "hidden_act", activation)
    config = TextConfig(
        vocab_size=_get(values, "vocab_size"),
        hidden_size=_get(values, "hidden_size"),
        intermediate_size=_get(values, "intermediate_size"),
        num_layers=_get(values, "num_hidden_layers"),
        num_heads=_get(values, "num_attention_heads"),
        num_kv_heads=_get(values, "num_key_value_heads"),
        rope_theta=_get({**values, **rope}, "rope_theta"),
        mrope_section=tuple(_get(rope, "mrope_section")),
        tie_word_embeddings=values["tie_word_embeddings"],
        rms_norm_eps=_get(values, "rms_norm_eps"),
        max_position_embeddings=_get(values, "max_position_embeddings"),
    )
    if 2 * sum(config.mrope_section) != config.head_dim:
        raise UserError(
            f"config.json: mrope_section {list(config.mrope_section)} must sum to half the head size {config.head_dim}"
        )
    return config
