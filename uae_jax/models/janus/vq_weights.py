"""Names of the image tokenizer's tensors in transformers' checkpoints (`model.vqmodel.` in those of a whole Janus)."""

import itertools

from uae_jax.convert.table import PATCHES, Entry
from uae_jax.models.janus.vq import VQConfig
from uae_jax.models.vae.weights import conv_entries, norm_entries
from uae_jax.sharding import COPIED, Rules, Split


def _pointwise(path: str, name: str, out: int, width: int) -> list[Entry]:
    """A 1 x 1 convolution there, a linear layer here."""
    return [
        Entry(f"{path}/kernel", f"{name}.weight", (out, width, 1, 1), PATCHES),
        Entry(f"{path}/bias", f"{name}.bias", (out,)),
    ]


def _resnet(path: str, name: str, out: int, width: int) -> list[Entry]:
    shortcut = conv_entries(f"{path}/conv_shortcut", f"{name}.nin_shortcut", out, width, 1) if out != width else []
    return [
        *norm_entries(f"{path}/norm1", f"{name}.norm1", width),
        *conv_entries(f"{path}/conv1", f"{name}.conv1", out, width),
        *norm_entries(f"{path}/norm2", f"{name}.norm2", out),
        *conv_entries(f"{path}/conv2", f"{name}.conv2", out, out),
        *shortcut,
    ]


def _attention(path: str, name: str, width: int) -> list[Entry]:
    entries = norm_entries(f"{path}/group_norm", f"{name}.norm", width)
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out", "proj_out")):
        entries += _pointwise(f"{path}/{ours}", f"{name}.{theirs}", width, width)
    return entries


def _mid(half: str, width: int) -> list[Entry]:
    return [
        *_resnet(f"{half}/mid/resnets_0", f"{half}.mid.block_1", width, width),
        *_attention(f"{half}/mid/attentions_0", f"{half}.mid.attn_1", width),
        *_resnet(f"{half}/mid/resnets_1", f"{half}.mid.block_2", width, width),
    ]


def _levels(half: str, levels: str, widths: tuple[int, ...], layers: int, attention: int) -> list[Entry]:
    """The resolutions of the encoder or the decoder.

    Args:
      widths: what the first one reads, then their own, in order of computation.
      layers: residual blocks of each.
      attention: which of them has attention.
    """
    entries = []
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        path, name = f"{half}/{levels}_{i}", f"{half}.{levels}.{i}"
        for j in range(layers):
            entries += _resnet(f"{path}/resnets_{j}", f"{name}.block.{j}", width, width if j else before)
            if i == attention:
                entries += _attention(f"{path}/attentions_{j}", f"{name}.attn.{j}", width)
        if i < len(widths) - 2:
            entries += conv_entries(f"{path}/{levels}samplers_0", f"{name}.{levels}sample.conv", width, width)
    return entries


def table(config: VQConfig) -> list[Entry]:
    """The name table of `VQModel(config)`."""
    widths, latent = config.widths, config.latent_channels
    first, last, base = widths[0], widths[-1], config.base_channels
    down, up = (base, *widths), (last, *widths[::-1])
    return [
        *conv_entries("encoder/conv_in", "encoder.conv_in", base, config.in_channels),
        *_levels("encoder", "down", down, config.num_res_blocks, len(widths) - 1),
        *_mid("encoder", last),
        *norm_entries("encoder/norm_out", "encoder.norm_out", last),
        *conv_entries("encoder/conv_out", "encoder.conv_out", latent, last),
        *_pointwise("quant_conv", "quant_conv", config.embed_dim, latent),
        Entry("codebook", "quantize.embedding.weight", (config.num_embeddings, config.embed_dim)),
        *_pointwise("post_quant_conv", "post_quant_conv", latent, config.embed_dim),
        *conv_entries("decoder/conv_in", "decoder.conv_in", last, latent),
        *_mid("decoder", last),
        *_levels("decoder", "up", up, config.num_res_blocks + 1, 0),
        *norm_entries("decoder/norm_out", "decoder.norm_out", first),
        *conv_entries("decoder/conv_out", "decoder.conv_out", config.out_channels, first),
    ]


def rules(config: VQConfig, tensor: int) -> Rules:
    """Sharding rules of `VQModel(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?(?:kernel|codebook)", Split.GATHERED))
