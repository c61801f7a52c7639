"""Names of CLIP's tensors in transformers' `CLIPModel` checkpoints."""

from uae_jax.convert.table import LINEAR, PATCHES, Entry, layers
from uae_jax.models.clip.config import Config, TextConfig, VisionConfig


def _norm(path: str, name: str, width: int) -> list[Entry]:
    return [Entry(f"{path}/scale", f"{name}.weight", (width,)), Entry(f"{path}/bias", f"{name}.bias", (width,))]


def _layers(config: VisionConfig | TextConfig, path: str, prefix: str) -> list[Entry]:
    d, ff = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{name}": (d, d) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes |= {"mlp.fc1": (ff, d), "mlp.fc2": (d, ff)}

    def entry(name: str, leaf: str, suffix: str, shape: tuple[int, ...]) -> Entry:
        names = layers(f"{prefix}.encoder.layers.{{}}.{name}.{suffix}", range(config.num_hidden_layers))
        ours = f"{path}/layers/{name.split('.')[-1]}/{leaf}"
        return Entry(ours, names, shape, LINEAR) if leaf == "kernel" else Entry(ours, names, shape)

    entries = []
    for name, shape in shapes.items():
        entries += [entry(name, "kernel", "weight", shape), entry(name, "bias", "bias", shape[:1])]
    for name in ("layer_norm1", "layer_norm2"):
        entries += [entry(name, "scale", "weight", (d,)), entry(name, "bias", "bias", (d,))]
    return entries


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
        *_norm("vision/pre_layernorm", "vision_model.pre_layrnorm", d),
        *_layers(vision, "vision", "vision_model"),
        *_norm("vision/post_layernorm", "vision_model.post_layernorm", d),
        Entry(
            "text/token_embedding/embedding",
            "text_model.embeddings.token_embedding.weight",
            (text.vocab_size, text.hidden_size),
        ),
        Entry(
            "text/position_embedding",
            "text_model.embeddings.position_embedding.weight",
            (text.max_position_embeddings, text.hidden_size),
        ),
        *_layers(text, "text", "text_model"),
        *_norm("text/final_layer_norm", "text_model.final_layer_norm", text.hidden_size),
        Entry("visual_projection/kernel", "visual_projection.weight", (config.projection_dim, d), LINEAR),
        Entry("text_projection/kernel", "text_projection.weight", (config.projection_dim, text.hidden_size), LINEAR),
    ]
