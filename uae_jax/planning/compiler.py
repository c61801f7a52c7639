"""Compiles a phase, and reads what the compiler says: memory on a chip, the partitioned program, or why it gave up."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from uae_jax.planning import partitioned
from uae_jax.planning.phases import Phase
from uae_jax.planning.topology import GIB

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


class Memory(NamedTuple):
    """Bytes on one chip, as the compiler allots them."""

    arguments: float
    results: float  # without those that take the place of an argument
    temporaries: float
    code: float

    @property
    def beyond_arguments(self) -> float:
        return self.results + self.temporaries + self.code


class Compiled(NamedTuple):
    """What compiling a phase came to."""

    seconds: float
    memory: Memory | None  # None: it does not fit
    message: str  # the compiler's own, where it does not fit
    needed: float | None  # bytes that the message says are needed
    program: partitioned.Partitioned | None  # None: the compiler wrote none


def compile_phase(phase: Phase, mesh: Mesh) -> Compiled:
    """Compiles a phase for the mesh it was laid out on."""
    slices = [getattr(device, "slice_index", None) or 0 for device in mesh.devices.flat]
    begin = time.perf_counter()
    lowered = phase.lower()
    with tempfile.TemporaryDirectory() as where:
        options = {"xla_dump_to": where, "xla_dump_hlo_pass_re": "spmd.*", "xla_dump_hlo_as_text": True}
        try:
            found = lowered.compile(compiler_options=options).memory_analysis()
            memory, message, needed = _memory(found), "", None
        except jax.errors.JaxRuntimeError as error:
            memory, message = None, " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in message:
                raise
            needed = needed_bytes(message)
        # Written before the compiler allots memory, so there even if it does not fit.
        dumps = sorted(Path(where).glob("*after*spmd-partitioning.before*.txt"))
        text = dumps[-1].read_text() if dumps else ""
    program = partitioned.read(text, slices.__getitem__, len(slices)) if text else None
    return Compiled(time.perf_counter() - begin, memory, message, needed, program)


def _memory(found: Any) -> Memory:
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def needed_bytes(message: str) -> float | None:
    """Bytes that a compiler's message of exhausted memory says the program needs; None if it does not say."""
    number = r"([\d.]+)\s*([KMGT]?)i?B?"
    for pattern in (rf"Used {number} of [\d.]+", rf"required for [^()]*\({number}\)", rf"allocate {number}ytes"):
        if found := re.search(pattern, message):
            return float(found[1]) * _UNITS[found[2]]
    return None


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
