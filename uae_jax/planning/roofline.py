"""How fast a phase could be: the slowest of computing, reading memory, and talking within and between slices.

A lower bound from published figures: no launch overheads, no waiting, everything overlapped, elementwise work fused
into products. Where nothing was compiled, bytes and exchanges are reckoned from the jaxpr instead of read.
"""

from typing import NamedTuple

from uae_jax.planning.compiler import Compiled
from uae_jax.planning.flops import Work
from uae_jax.planning.topology import Chip


class Load(NamedTuple):
    """What a phase asks of one chip."""

    flops: float
    hbm: float  # bytes
    ici: float  # bytes
    dcn: float  # bytes


class Estimate(NamedTuple):
    """Seconds of a phase, resource by resource; the slowest is the estimate."""

    compute: float
    hbm: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that holds the phase."""
        return max(self._fields, key=lambda name: getattr(self, name))


def estimate(load: Load, chip: Chip) -> Estimate:
    """The roofline of a load."""
    return Estimate(load.flops / chip.flops, load.hbm / chip.hbm_bandwidth, load.ici / chip.ici, load.dcn / chip.dcn)


def compiled_load(work: Work, compiled: Compiled, chips: int, times: int) -> Load:
    """What the partitioned program asks; at least the work of the jaxpr, which a product in a kernel would hide.

    Args:
      times: runs of the program in a step, which are in `work` and `compiled.program`.
    """
    program, memory = compiled.program, compiled.memory
    touched = memory.arguments + memory.results if memory else 0.0
    if program is None:  # one chip: nothing was partitioned
        return Load(work.flops(chips), max(work.bytes(chips), times * touched), 0.0, 0.0)
    ici, dcn = (sum(getattr(c, name) for c in program.collectives) for name in ("received", "received_dcn"))
    return Load(max(program.flops, work.flops(chips)), max(program.bytes, times * touched), ici, dcn)


class Layout(NamedTuple):
    """What the arithmetic knows of a run's mesh and of its captioner."""

    chips: int
    fsdp: int  # parts that weights lie in
    tensor: int
    domains: int  # slices, or hosts of GPUs, that gradients are summed over
    share: float  # of the captioner's weights, that a chip uses
    trained: float  # bytes of what is trained, all of it


def reckoned_load(work: Work, layout: Layout, captioner: bool, update: bool, exchanged: float) -> Load:
    """What a phase would ask if every layer's weights were gathered at each use, and a token loop's once.

    Args:
      captioner: its weights are the captioner's, which tensor splits.
      update: gradients are summed over all chips.
      exchanged: bytes of activations that are summed over tensor, all of them.
    """
    chips, tensor, domains = layout.chips, layout.tensor, layout.domains
    share = layout.share if captioner else 1.0
    gathered = (work.held or work.whole_bytes) * share * (layout.fsdp - 1) / layout.fsdp
    summed = 2 * exchanged * (tensor - 1) / chips
    reduced = 2 * layout.trained * (chips - 1) / chips if update else 0.0
    dcn = 2 * layout.trained / (chips // domains) * (domains - 1) / domains if update else 0.0
    return Load(
        work.flops(chips), work.split_bytes / chips + work.whole_bytes * share, gathered + summed + reduced, dcn
    )
