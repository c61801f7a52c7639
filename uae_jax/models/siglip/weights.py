"""Names of SigLIP's tensors in the hub's checkpoints, of both towers or of the image tower alone."""

from uae_jax.convert.table import LINEAR, PATCHES, Entry
from uae_jax.models.clip.config import VisionConfig
from uae_jax.models.clip.weights import layer_entries, norm_entries
from uae_jax.models.siglip.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def _dense(path: str, name: str, out: int, size: int) -> list[Entry]:
    return [
        Entry(f"{path}/kernel", f"{name}.weight", (out, size), LINEAR),
        Entry(f"{path}/bias", f"{name}.bias", (out,)),
    ]


def _vision(config: VisionConfig, prefix: str) -> list[Entry]:
    d, p, ff = config.hidden_size, config.patch_size, config.intermediate_size
    embeddings, head = f"{prefix}embeddings", f"{prefix}head"
    return [
        Entry(
            "vision/patch_embedding/kernel",
            f"{embeddings}.patch_embedding.weight",
            (d, config.num_channels, p, p),
            PATCHES,
        ),
        Entry("vision/patch_embedding/bias", f"{embeddings}.patch_embedding.bias", (d,)),
        Entry("vision/position_embedding", f"{embeddings}.position_embedding.weight", (config.num_patches, d)),
        *layer_entries(config, "vision", prefix),
        *norm_entries("vision/post_layernorm", f"{prefix}post_layernorm", d),
        Entry("vision/head/probe", f"{head}.probe", (1, 1, d)),
        Entry("vision/head/in_proj/kernel", f"{head}.attention.in_proj_weight", (3 * d, d), LINEAR),
        Entry("vision/head/in_proj/bias", f"{head}.attention.in_proj_bias", (3 * d,)),
        *_dense("vision/head/out_proj", f"{head}.attention.out_proj", d, d),
        *norm_entries("vision/head/layernorm", f"{head}.layernorm", d),
        *_dense("vision/head/fc1", f"{head}.mlp.fc1", ff, d),
        *_dense("vision/head/fc2", f"{head}.mlp.fc2", d, ff),
    ]


def table(config: Config) -> list[Entry]:
    """The name table of `SigLIP(config)`."""
    if config.text is None or config.projection_size is None:
        return _vision(config.vision, "")
    text, d = config.text, config.text.hidden_size
    embeddings = "text_model.embeddings"
    return [
        Entry("logit_scale", "logit_scale", (1,)),
        Entry("logit_bias", "logit_bias", (1,)),
        *_vision(config.vision, "vision_model."),
        Entry("text/token_embedding/embedding", f"{embeddings}.token_embedding.weight", (text.vocab_size, d)),
        Entry("text/position_embedding", f"{embeddings}.position_embedding.weight", (text.max_position_embeddings, d)),
        *layer_entries(text, "text", "text_model."),
        *norm_entries("text/final_layer_norm", "text_model.final_layer_norm", d),
        *_dense("text/head", "text_model.head", config.projection_size, d),
    ]


def canonical_vision(name: str) -> str:
    """A tensor's name in the table of an image tower alone: the hub's older files have a prefix."""
    return name.removeprefix("vision_model.")


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `SigLIP(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?(?:kernel|embedding|position_embedding)", Split.GATHERED))
