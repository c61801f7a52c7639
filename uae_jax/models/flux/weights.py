"""Names of the MM-DiT's tensors in diffusers' `transformer/` checkpoints of FLUX.1."""

from uae_jax.convert.table import LINEAR, Entry, Names, layers
from uae_jax.models.flux.config import Config
from uae_jax.models.mmdit import TIME_CHANNELS
from uae_jax.sharding import COPIED, Rules, Split


def _linear(path: str, weight: Names, bias: Names, out: int, width: int) -> list[Entry]:
    return [Entry(f"{path}/kernel", weight, (out, width), LINEAR), Entry(f"{path}/bias", bias, (out,))]


def _blocks(
    config: Config, path: str, prefix: str, length: int, linears: list[tuple[str, str, int, int]], norms: list[str]
) -> list[Entry]:
    """Entries of `length` stacked blocks; `linears` holds our name, the checkpoint's, outputs and inputs."""
    entries = []
    for ours, theirs, out, width in linears:
        weight, bias = (layers(f"{prefix}.{{}}.{theirs}.{leaf}", range(length)) for leaf in ("weight", "bias"))
        entries += _linear(f"{path}/{ours}", weight, bias, out, width)
    for norm in norms:
        names = layers(f"{prefix}.{{}}.attn.{norm}.weight", range(length))
        entries.append(Entry(f"{path}/attn/{norm}/scale", names, (config.attention_head_dim,)))
    return entries


def table(config: Config) -> list[Entry]:
    """The name table of `FluxTransformer(config)`."""
    d = config.width

    def linear(path: str, name: str, out: int, width: int) -> list[Entry]:
        return _linear(path, f"{name}.weight", f"{name}.bias", out, width)

    entries = []
    embedders = [("time_embedder", "timestep_embedder", TIME_CHANNELS)]
    if config.guidance_embeds:
        embedders.append(("guidance_embedder", "guidance_embedder", TIME_CHANNELS))
    embedders.append(("pooled_embedder", "text_embedder", config.pooled_projection_dim))
    for path, name, width in embedders:
        entries += linear(f"{path}/linear_1", f"time_text_embed.{name}.linear_1", d, width)
        entries += linear(f"{path}/linear_2", f"time_text_embed.{name}.linear_2", d, d)
    entries += linear("context_embedder", "context_embedder", d, config.joint_attention_dim)
    entries += linear("x_embedder", "x_embedder", d, config.in_channels)

    own = [(f"attn/to_{part}", f"attn.to_{part}", d, d) for part in "qkv"]
    double = [("norm1/linear", "norm1.linear", 6 * d, d), ("norm1_context/linear", "norm1_context.linear", 6 * d, d)]
    double += own + [(f"attn/add_{part}_proj", f"attn.add_{part}_proj", d, d) for part in "qkv"]
    double += [("attn/to_out", "attn.to_out.0", d, d), ("attn/to_add_out", "attn.to_add_out", d, d)]
    for ff in ("ff", "ff_context"):
        double += [(f"{ff}/up", f"{ff}.net.0.proj", 4 * d, d), (f"{ff}/down", f"{ff}.net.2", d, 4 * d)]
    single = [("norm/linear", "norm.linear", 3 * d, d), *own]
    single += [("proj_mlp", "proj_mlp", 4 * d, d), ("proj_out", "proj_out", d, 5 * d)]
    norms = ["norm_q", "norm_k"]
    entries += _blocks(
        config, "blocks", "transformer_blocks", config.num_layers, double, [*norms, "norm_added_q", "norm_added_k"]
    )
    entries += _blocks(config, "single_blocks", "single_transformer_blocks", config.num_single_layers, single, norms)
    entries += linear("norm_out/linear", "norm_out.linear", 2 * d, d)
    entries += linear("proj_out", "proj_out", config.token_out, d)
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `FluxTransformer(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?kernel", Split.GATHERED))
