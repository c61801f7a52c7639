"""Names of DINOv2's tensors in the hub's checkpoints, with and without registers."""

from uae_jax.convert.table import KEEP, LINEAR, PATCHES, Entry, layers
from uae_jax.models.dinov2.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def table(config: Config) -> list[Entry]:
    """The name table of `DINOv2(config)`."""
    d, p, width = config.hidden_size, config.patch_size, config.intermediate_size
    entries = [
        Entry("cls_token", "embeddings.cls_token", (1, 1, d)),
        Entry("position_embeddings", "embeddings.position_embeddings", (1, 1 + config.grid**2, d)),
        Entry(
            "patch_embedding/kernel",
            "embeddings.patch_embeddings.projection.weight",
            (d, config.num_channels, p, p),
            PATCHES,
        ),
        Entry("patch_embedding/bias", "embeddings.patch_embeddings.projection.bias", (d,)),
        Entry("layernorm/scale", "layernorm.weight", (d,)),
        Entry("layernorm/bias", "layernorm.bias", (d,)),
    ]
    if config.num_register_tokens is not None or config.use_mask_token:
        entries.append(Entry("mask_token", "embeddings.mask_token", (1, d)))
    if config.num_register_tokens is not None:
        entries.append(Entry("register_tokens", "embeddings.register_tokens", (1, config.num_register_tokens, d)))

    def add(ours: str, theirs: str, shape: tuple[int, ...]) -> None:
        names = layers(f"encoder.layer.{{}}.{theirs}", range(config.num_hidden_layers))
        entries.append(Entry(f"layers/{ours}", names, shape, LINEAR if ours.endswith("kernel") else KEEP))

    def dense(ours: str, theirs: str, out: int, size: int, bias: bool = True) -> None:
        add(f"{ours}/kernel", f"{theirs}.weight", (out, size))
        if bias:
            add(f"{ours}/bias", f"{theirs}.bias", (out,))

    for name in ("query", "key", "value"):
        dense(f"attention/{name}", f"attention.attention.{name}", d, d, config.qkv_bias)
    dense("attention/out", "attention.output.dense", d, d)
    if config.use_swiglu_ffn:
        dense("mlp/gate_up", "mlp.weights_in", 2 * width, d)
        dense("mlp/down", "mlp.weights_out", d, width)
    else:
        dense("mlp/up", "mlp.fc1", width, d)
        dense("mlp/down", "mlp.fc2", d, width)
    for i in (1, 2):
        add(f"scale{i}", f"layer_scale{i}.lambda1", (d,))
        add(f"norm{i}/scale", f"norm{i}.weight", (d,))
        add(f"norm{i}/bias", f"norm{i}.bias", (d,))
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `DINOv2(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?(?:kernel|position_embeddings)", Split.GATHERED))
