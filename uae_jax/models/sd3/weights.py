"""Names of the MM-DiT's tensors in diffusers' `transformer/` checkpoints of SD3 and SD3.5."""

from collections.abc import Iterable

from uae_jax.convert.table import LINEAR, PATCHES, Entry, Names, layers
from uae_jax.models.mmdit import TIME_CHANNELS
from uae_jax.models.sd3.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def _linear(path: str, weight: Names, bias: Names, out: int, width: int) -> list[Entry]:
    return [Entry(f"{path}/kernel", weight, (out, width), LINEAR), Entry(f"{path}/bias", bias, (out,))]


def _block(
    config: Config, path: str, indices: Iterable[int] | int, dual: bool = False, last: bool = False
) -> list[Entry]:
    """Entries of the blocks `indices`, stacked, or of one block when it is a single index."""

    def names(suffix: str) -> Names:
        template = f"transformer_blocks.{{}}.{suffix}"
        return template.format(indices) if isinstance(indices, int) else layers(template, indices)

    def linear(name: str, torch_name: str, out: int, width: int) -> list[Entry]:
        return _linear(f"{path}/{name}", names(f"{torch_name}.weight"), names(f"{torch_name}.bias"), out, width)

    def attention(name: str, projections: list[tuple[str, str]], norms: list[str]) -> list[Entry]:
        entries = [e for ours, theirs in projections for e in linear(f"{name}/{ours}", f"{name}.{theirs}", d, d)]
        if config.qk_norm:
            shape = (config.attention_head_dim,)
            entries += [Entry(f"{path}/{name}/{norm}/scale", names(f"{name}.{norm}.weight"), shape) for norm in norms]
        return entries

    d = config.width
    own = [("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")]
    added = [(name, name) for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
    added += [] if last else [("to_add_out", "to_add_out")]
    table = linear("norm1/linear", "norm1.linear", (9 if dual else 6) * d, d)
    table += linear("norm1_context/linear", "norm1_context.linear", (2 if last else 6) * d, d)
    table += attention("attn", own + added, ["norm_q", "norm_k", "norm_added_q", "norm_added_k"])
    if dual:
        table += attention("attn2", own, ["norm_q", "norm_k"])
    for ff in ["ff"] if last else ["ff", "ff_context"]:
        table += linear(f"{ff}/up", f"{ff}.net.0.proj", 4 * d, d) + linear(f"{ff}/down", f"{ff}.net.2", d, 4 * d)
    return table


def table(config: Config) -> list[Entry]:
    """The name table of `SD3Transformer(config)`."""
    d, p = config.width, config.patch_size

    def linear(path: str, name: str, out: int, width: int) -> list[Entry]:
        return _linear(path, f"{name}.weight", f"{name}.bias", out, width)

    entries = [
        Entry("pos_embed/pos_embed", "pos_embed.pos_embed", (1, config.pos_embed_max_size**2, d)),
        Entry("pos_embed/proj/kernel", "pos_embed.proj.weight", (d, config.in_channels, p, p), PATCHES),
        Entry("pos_embed/proj/bias", "pos_embed.proj.bias", (d,)),
    ]
    for path, name, width in (
        ("time_embedder", "timestep_embedder", TIME_CHANNELS),
        ("pooled_embedder", "text_embedder", config.pooled_projection_dim),
    ):
        entries += linear(f"{path}/linear_1", f"time_text_embed.{name}.linear_1", d, width)
        entries += linear(f"{path}/linear_2", f"time_text_embed.{name}.linear_2", d, d)
    entries += linear("context_embedder", "context_embedder", d, config.joint_attention_dim)
    if config.num_dual:
        entries += _block(config, "dual_blocks", range(config.num_dual), dual=True)
    if config.num_plain:
        entries += _block(config, "blocks", range(config.num_dual, config.num_layers - 1))
    entries += _block(config, "last_block", config.num_layers - 1, last=True)
    entries += linear("norm_out/linear", "norm_out.linear", 2 * d, d)
    entries += linear("proj_out", "proj_out", p * p * config.out_channels, d)
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `SD3Transformer(config)`: tensor splits its batch and no weights.

    Its heads need not divide (SD3.5 large has 38), and modulations make up a third of it.
    """
    return (*COPIED, (r"(?:.*/)?(?:kernel|pos_embed)", Split.GATHERED))
