"""Compiles a phase, and reads what the compiler says: memory on a chip, the partitioned program, or why it gave up."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from uae_jax.planning import abstract, partitioned, topology
from uae_jax.planning.phases import Phase
from uae_jax.planning.topology import GIB

_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


class Memory(NamedTuple):
    """Bytes on one chip, as the compiler allots them."""

    arguments: float
    results: float  # without those that take the place of an argument
    temporaries: float
    code: float


class Compiled(NamedTuple):
    """What compiling a phase came to."""

    seconds: float
    arguments: float  # bytes a chip of all that it is given
    memory: Memory | None  # None: it does not fit
    message: str  # the compiler's own, where it does not fit
    program: partitioned.Partitioned | None  # None: one chip, nothing to partition

    @property
    def beyond_arguments(self) -> float:
        """Bytes a chip besides the arguments; what the message says where it does not fit, 0 if that says nothing."""
        if self.memory is not None:
            return self.memory.results + self.memory.temporaries + self.memory.code
        return beyond_arguments(self.message, self.arguments)


def compile_phase(phase: Phase) -> Compiled:
    """Compiles a phase for the mesh it was laid out on."""
    domains = [topology.domain(device) for device in phase.mesh.devices.flat]
    begin = time.perf_counter()
    lowered = phase.lower()
    with tempfile.TemporaryDirectory() as where:
        options = {"xla_dump_to": where, "xla_dump_hlo_pass_re": "spmd.*", "xla_dump_hlo_as_text": True}
        try:
            memory, message = _memory(lowered.compile(compiler_options=options).memory_analysis()), ""
        except jax.errors.JaxRuntimeError as error:
            memory, message = None, " ".join(str(error).split())
            if "RESOURCE_EXHAUSTED" not in message:
                raise
        # Written before the compiler allots memory, so there even if it does not fit.
        dumps = sorted(Path(where).glob("*after*spmd-partitioning.before*.txt"))
        text = dumps[-1].read_text() if dumps else ""
    program = partitioned.read(text, domains.__getitem__, len(domains), phase.times) if text else None
    seconds = time.perf_counter() - begin
    return Compiled(seconds, abstract.bytes_per_chip(phase.arguments), memory, message, program)


def _memory(found: Any) -> Memory:
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )


def beyond_arguments(message: str, arguments: float) -> float:
    """Bytes besides the arguments that a compiler's message of exhausted memory says are needed; 0 if it does not say.

    Args:
      arguments: bytes of those, which some messages include.
    """
    number = r"([\d.]+)\s*([KMGT]?)"
    if found := re.search(rf"\({number}i?B?\) exceeds available", message):  # libtpu: temporaries alone
        return float(found[1]) * _UNITS[found[2]]
    if found := re.search(rf"Used {number}i?B? of", message):  # libtpu, older: everything
        return max(float(found[1]) * _UNITS[found[2]] - arguments, 0.0)
    return 0.0


def gib(size: float) -> float:
    """Bytes in GiB."""
    return size / GIB
