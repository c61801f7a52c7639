"""Names of DINOv3's tensors in the hub's checkpoints of its vision transformers."""

from uae_jax.convert.table import KEEP, LINEAR, PATCHES, Entry, layers
from uae_jax.models.dinov3.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def canonical(name: str) -> str:
    """A tensor's name in `table`: transformers 5 calls `model.layer` in memory what the hub's files call `layer`."""
    return name.removeprefix("model.")


def table(config: Config) -> list[Entry]:
    """The name table of `DINOv3(config)`."""
    d, p, width = config.hidden_size, config.patch_size, config.intermediate_size
    entries = [
        Entry("cls_token", "embeddings.cls_token", (1, 1, d)),
        Entry("mask_token", "embeddings.mask_token", (1, 1, d)),
        Entry("register_tokens", "embeddings.register_tokens", (1, config.num_register_tokens, d)),
        Entry("patch_embedding/kernel", "embeddings.patch_embeddings.weight", (d, config.num_channels, p, p), PATCHES),
        Entry("patch_embedding/bias", "embeddings.patch_embeddings.bias", (d,)),
        Entry("norm/scale", "norm.weight", (d,)),
        Entry("norm/bias", "norm.bias", (d,)),
    ]

    def add(ours: str, theirs: str, shape: tuple[int, ...]) -> None:
        names = layers(f"layer.{{}}.{theirs}", range(config.num_hidden_layers))
        entries.append(Entry(f"layers/{ours}", names, shape, LINEAR if ours.endswith("kernel") else KEEP))

    def dense(ours: str, theirs: str, out: int, size: int, bias: bool) -> None:
        add(f"{ours}/kernel", f"{theirs}.weight", (out, size))
        if bias:
            add(f"{ours}/bias", f"{theirs}.bias", (out,))

    dense("attention/query", "attention.q_proj", d, d, config.query_bias)
    dense("attention/key", "attention.k_proj", d, d, config.key_bias)
    dense("attention/value", "attention.v_proj", d, d, config.value_bias)
    dense("attention/out", "attention.o_proj", d, d, config.proj_bias)
    if config.use_gated_mlp:
        dense("mlp/gate", "mlp.gate_proj", width, d, config.mlp_bias)
    dense("mlp/up", "mlp.up_proj", width, d, config.mlp_bias)
    dense("mlp/down", "mlp.down_proj", d, width, config.mlp_bias)
    for i in (1, 2):
        add(f"scale{i}", f"layer_scale{i}.lambda1", (d,))
        add(f"norm{i}/scale", f"norm{i}.weight", (d,))
        add(f"norm{i}/bias", f"norm{i}.bias", (d,))
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `DINOv3(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?kernel", Split.GATHERED))
