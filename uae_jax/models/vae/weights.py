"""Names of the VAE's tensors in diffusers' `vae/` checkpoints of SD3 and FLUX."""

import itertools

from uae_jax.convert.table import CONV2D, LINEAR, Entry
from uae_jax.models.vae.config import Config
from uae_jax.sharding import COPIED, Rules, Split


def conv_entries(path: str, name: str, out: int, width: int, side: int = 3) -> list[Entry]:
    """Kernel and bias of a convolution."""
    kernel = Entry(f"{path}/kernel", f"{name}.weight", (out, width, side, side), CONV2D)
    return [kernel, Entry(f"{path}/bias", f"{name}.bias", (out,))]


def norm_entries(path: str, name: str, width: int) -> list[Entry]:
    """Scale and bias of a group norm."""
    return [Entry(f"{path}/scale", f"{name}.weight", (width,)), Entry(f"{path}/bias", f"{name}.bias", (width,))]


def _resnet(path: str, name: str, out: int, width: int) -> list[Entry]:
    shortcut = conv_entries(f"{path}/conv_shortcut", f"{name}.conv_shortcut", out, width, 1) if out != width else []
    return [
        *norm_entries(f"{path}/norm1", f"{name}.norm1", width),
        *conv_entries(f"{path}/conv1", f"{name}.conv1", out, width),
        *norm_entries(f"{path}/norm2", f"{name}.norm2", out),
        *conv_entries(f"{path}/conv2", f"{name}.conv2", out, out),
        *shortcut,
    ]


def _mid_block(path: str, name: str, width: int) -> list[Entry]:
    entries = [e for i in range(2) for e in _resnet(f"{path}/resnets_{i}", f"{name}.resnets.{i}", width, width)]
    path, name = f"{path}/attentions_0", f"{name}.attentions.0"
    entries += norm_entries(f"{path}/group_norm", f"{name}.group_norm", width)
    for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
        entries.append(Entry(f"{path}/{ours}/kernel", f"{name}.{theirs}.weight", (width, width), LINEAR))
        entries.append(Entry(f"{path}/{ours}/bias", f"{name}.{theirs}.bias", (width,)))
    return entries


def _half(half: str, blocks: str, sampler: str, widths: tuple[int, ...], layers: int) -> list[Entry]:
    """The blocks of the encoder or the decoder, `widths` in order of computation."""
    entries = []
    for i, (before, width) in enumerate(itertools.pairwise((widths[0], *widths))):
        path, name = f"{half}/{blocks}_{i}", f"{half}.{blocks}.{i}"
        for j in range(layers):
            entries += _resnet(f"{path}/resnets_{j}", f"{name}.resnets.{j}", width, width if j else before)
        if i < len(widths) - 1:
            entries += conv_entries(f"{path}/{sampler}_0", f"{name}.{sampler}.0.conv", width, width)
    return entries


def table(config: Config) -> list[Entry]:
    """The name table of `AutoencoderKL(config)`."""
    widths = config.block_out_channels
    first, last, latent = widths[0], widths[-1], config.latent_channels
    return [
        *conv_entries("encoder/conv_in", "encoder.conv_in", first, config.in_channels),
        *_half("encoder", "down_blocks", "downsamplers", widths, config.layers_per_block),
        *_mid_block("encoder/mid_block", "encoder.mid_block", last),
        *norm_entries("encoder/conv_norm_out", "encoder.conv_norm_out", last),
        *conv_entries("encoder/conv_out", "encoder.conv_out", 2 * latent, last),
        *conv_entries("decoder/conv_in", "decoder.conv_in", last, latent),
        *_mid_block("decoder/mid_block", "decoder.mid_block", last),
        *_half("decoder", "up_blocks", "upsamplers", widths[::-1], config.layers_per_block + 1),
        *norm_entries("decoder/conv_norm_out", "decoder.conv_norm_out", first),
        *conv_entries("decoder/conv_out", "decoder.conv_out", config.out_channels, first),
    ]


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `AutoencoderKL(config)`: no part of it is split by tensor, which splits its batch instead."""
    return (*COPIED, (r"(?:.*/)?kernel", Split.GATHERED))
