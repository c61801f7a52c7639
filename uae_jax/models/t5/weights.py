"""Names of T5's tensors in transformers' `T5EncoderModel` checkpoints."""

from collections.abc import Mapping

from uae_jax.convert.table import LINEAR, Entry, layers
from uae_jax.models.t5.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def table(config: Config) -> list[Entry]:
    """The name table of `T5Encoder(config)`."""
    d, inner, ff = config.d_model, config.num_heads * config.d_kv, config.d_ff
    shapes = {f"layer.0.SelfAttention.{name}": (inner, d) for name in "qkv"}
    shapes["layer.0.SelfAttention.o"] = (d, inner)
    shapes |= {f"layer.1.DenseReluDense.{name}": (ff, d) for name in ("wi_0", "wi_1")}
    shapes["layer.1.DenseReluDense.wo"] = (d, ff)

    def stacked(name: str) -> tuple[str, ...]:
        return layers(f"encoder.block.{{}}.{name}.weight", range(config.num_layers))

    return [
        Entry("shared/embedding", "shared.weight", (config.vocab_size, d)),
        # The first layer holds the bias of all.
        Entry(
            "relative_attention_bias",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (config.relative_attention_num_buckets, config.num_heads),
        ),
        *(
            Entry(f"layers/{name.split('.')[-1]}/kernel", stacked(name), shape, LINEAR)
            for name, shape in shapes.items()
        ),
        Entry("layers/attention_norm/scale", stacked("layer.0.layer_norm"), (d,)),
        Entry("layers/feed_forward_norm/scale", stacked("layer.1.layer_norm"), (d,)),
        Entry("final_layer_norm/scale", "encoder.final_layer_norm.weight", (d,)),
    ]


def ties(config: Config) -> Mapping[str, str]:
    """The copy of the embedding that some files hold, and the tensor that it is a copy of."""
    return {"encoder.embed_tokens.weight": "shared.weight"}


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `T5Encoder(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?(?:kernel|embedding|relative_attention_bias)", Split.GATHERED))
