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


def compiled_load(work: Work, compiled: Compiled, chips: int) -> Load:
    """What the partitioned program asks; at least the work of the jaxpr, which a product in a kernel would hide."""
    program, memory = compiled.program, compiled.memory
    if program is None:  # one chip: nothing was partitioned
        touched = memory.arguments + memory.results if memory else 0.0
        return Load(work.flops(chips), max(work.bytes(chips), touched), 0.0, 0.0)
    touched = memory.arguments + memory.results if memory else 0.0
    ici, dcn = (sum(getattr(c, name) for c in program.collectives) for name in ("received", "received_dcn"))
    return Load(max(program.flops, work.flops(chips)), max(program.bytes, touched), ici, dcn)


def reckoned_load(name: str, work: Work, chips: int, fsdp: int, domains: int, trained: float) -> Load:
    """What a phase would ask if every layer's weights were gathered at each use, and the token loop's once.

    Args:
      fsdp: parts that weights lie in.
      domains: slices, or hosts of GPUs, that gradients are summed over.
      trained: bytes of what is trained, all of it.
    """
    share = (fsdp - 1) / fsdp
    gathered = (work.held if name == "sample" else work.whole_bytes) * share
    reduced = 2 * trained * (chips - 1) / chips if name == "update" else 0.0
    dcn = 2 * trained / (chips // domains) * (domains - 1) / domains if name == "update" else 0.0
    return Load(work.flops(chips), work.bytes(chips), gathered + reduced, dcn)
