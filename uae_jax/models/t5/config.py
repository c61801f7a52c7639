"""Configuration of the T5 v1.1 encoder, under the field names of transformers' `T5Config`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from uae_jax.errors import UserError

CLASS_NAME = "T5EncoderModel"


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one encoder; defaults are those of T5 v1.1 XXL, which SD3 and FLUX read.

    Attributes:
      vocab_size: tokens.
      d_model: width of the states.
      d_kv: width of a head; the heads need not make up d_model.
      d_ff: width of the feed-forward layer.
      num_layers: blocks.
      num_heads: heads.
      relative_attention_num_buckets: buckets of relative positions, half of them for each direction.
      relative_attention_max_distance: distance from which on all share a bucket.
      layer_norm_epsilon: of the norms.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Config":
        """Reads transformers' `config.json`.

        Raises:
          UserError: it is another model's, a size is missing, or it is the T5 of 2019, whose feed-forward differs.
        """
        name = (hf.get("architectures") or [CLASS_NAME])[0]
        if name != CLASS_NAME or hf.get("model_type", "t5") != "t5":
            raise UserError(f"this is a {name} config of model_type {hf.get('model_type')!r}, not a {CLASS_NAME} one")
        activation = hf.get("feed_forward_proj", "relu")
        if activation != "gated-gelu":
            raise UserError(f"feed_forward_proj {activation!r} is not supported: only T5 v1.1 (gated-gelu) is")
        # transformers' defaults for the rest are the ones above.
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        missing = [size for size in sizes if size not in hf]
        if missing:
            raise UserError(f"{CLASS_NAME} config: missing fields {missing}")
        return cls(**{f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": [CLASS_NAME],
            "model_type": "t5",
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            **dataclasses.asdict(self),
        }
