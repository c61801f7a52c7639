"""Names of CLIP's tensors in transformers' checkpoints of `CLIPModel` and of its text tower alone."""

from uae_jax.convert.table import LINEAR, PATCHES, Entry, layers
from uae_jax.models.clip.config import Config, TextConfig, TextModelConfig, VisionConfig
from uae_jax.sharding import COPIED, Rules, Split

# The numbers 0, 1, 2, ..., which transformers saved with CLIP and SigLIP until it stopped.
BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "embeddings.position_ids")


def norm_entries(path: str, name: str, width: int) -> list[Entry]:
    """A layer norm."""
    return [Entry(f"{path}/scale", f"{name}.weight", (width,)), Entry(f"{path}/bias", f"{name}.bias", (width,))]


def layer_entries(config: VisionConfig | TextConfig, path: str, prefix: str) -> list[Entry]:
    """The layers of a tower (`encoder`), whose names begin with `prefix`."""
    d, ff = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{name}": (d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes |= {"mlp.fc1": (ff, d), "mlp.fc2": (d, ff)}

    def entry(name: str, leaf: str, suffix: str, shape: tuple[int, ...]) -> Entry:
        names = layers(f"{prefix}encoder.layers.{{}}.{name}.{suffix}", range(config.num_hidden_layers))
        ours = f"{path}/layers/{name.split('.')[-1]}/{leaf}"
        return Entry(ours, names, shape, LINEAR) if leaf == "kernel" else Entry(ours, names, shape)

    entries = []
    for name, shape in shapes.items():
        entries += [entry(name, "kernel", "weight", shape), entry(name, "bias", "bias", shape[:1])]
    for name in ("layer_norm1", "layer_norm2"):
        entries += [entry(name, "scale", "weight", (d,)), entry(name, "bias", "bias", (d,))]
    return entries


def _text(config: TextConfig) -> list[Entry]:
    """Entries of the text tower, which are the same in a model of its own."""
    return [
        Entry(
            "text/token_embedding/embedding",
            "text_model.embeddings.token_embedding.weight",
            (config.vocab_size, config.hidden_size),
        ),
        Entry(
            "text/position_embedding",
            "text_model.embeddings.position_embedding.weight",
            (config.max_position_embeddings, config.hidden_size),
        ),
        *layer_entries(config, "text", "text_model."),
        *norm_entries("text/final_layer_norm", "text_model.final_layer_norm", config.hidden_size),
    ]


def _text_projection(config: TextConfig, out: int) -> Entry:
    return Entry("text_projection/kernel", "text_projection.weight", (out, config.hidden_size), LINEAR)


def table(config: Config) -> list[Entry]:
    """The name table of `CLIP(config)`."""
    vision, text = config.vision, config.text
    d, p = vision.hidden_size, vision.patch_size
    embeddings = "vision_model.embeddings"
    return [
        Entry("logit_scale", "logit_scale", ()),
        Entry("vision/class_embedding", f"{embeddings}.class_embedding", (d,)),
        Entry(
            "vision/patch_embedding/kernel",
            f"{embeddings}.patch_embedding.weight",
            (d, vision.num_channels, p, p),
            PATCHES,
        ),
        Entry("vision/position_embedding", f"{embeddings}.position_embedding.weight", (1 + vision.num_patches, d)),
        *norm_entries("vision/pre_layernorm", "vision_model.pre_layrnorm", d),
        *layer_entries(vision, "vision", "vision_model."),
        *norm_entries("vision/post_layernorm", "vision_model.post_layernorm", d),
        *_text(text),
        Entry("visual_projection/kernel", "visual_projection.weight", (config.projection_dim, d), LINEAR),
        _text_projection(text, config.projection_dim),
    ]


def text_table(config: TextModelConfig) -> list[Entry]:
    """The name table of `CLIPText(config)`."""
    projection = [] if config.projection_dim is None else [_text_projection(config.text, config.projection_dim)]
    return [*_text(config.text), *projection]


def canonical_text(name: str) -> str:
    """A tensor's name in `text_table`: transformers 5 saves a `CLIPTextModel` without the prefix of the hub's files."""
    return f"text_model.{name}" if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else name


_WHOLE: Rules = ((r"(?:.*/)?(?:kernel|embedding|position_embedding)", Split.GATHERED),)


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `CLIP(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, *_WHOLE)


def text_rules(config: TextModelConfig, tensor: int) -> Rules:
    """Sharding rules of `CLIPText(config)`: those of `CLIP`."""
    return (*COPIED, *_WHOLE)
