"""Machines by name, `v5p:4x4x8` or `h100:8`: their published figures, and devices to compile for without owning one."""

import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from uae_jax.errors import UserError

if TYPE_CHECKING:
    import jax

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of one chip. A roofline is no better than they are."""

    platform: str  # tpu, gpu or cpu
    hbm: float  # bytes a program may use, as the compiler says; below the nominal size
    flops: float  # dense bfloat16 FLOP/s
    hbm_bandwidth: float  # bytes/s
    ici: float  # bytes/s that a chip receives over all its links to others of its slice (NVLink on GPUs), one way
    dcn: float  # bytes/s that a chip receives from other slices (hosts, on GPUs)
    source: str


GPU_MEMORY_SHARE = 0.9  # what is left to a program with XLA_PYTHON_CLIENT_MEM_FRACTION=.9
_DOCS = "cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip("tpu", 15.75 * GIB, 197e12, 800e9, 1600e9 / 8, 25e9 / 8, f"{_DOCS}/v5e, DCN 200 Gb/s a host of 8"),
    "v5p": Chip("tpu", 95.73 * GIB, 459e12, 2765e9, 4800e9 / 8, 50e9 / 8, f"{_DOCS}/v5p, DCN 200 Gb/s a host of 4"),
    "v6e": Chip("tpu", 31.24 * GIB, 918e12, 1600e9, 3200e9 / 8, 100e9 / 8, f"{_DOCS}/v6e, DCN 800 Gb/s a host of 8"),
    "h100": Chip(
        "gpu",
        GPU_MEMORY_SHARE * 79.1 * GIB,
        989e12,
        3350e9,
        450e9,
        50e9,
        "NVIDIA's data sheet, H100 SXM; 400 Gb/s a GPU",
    ),
    "h200": Chip(
        "gpu", GPU_MEMORY_SHARE * 141.0 * GIB, 989e12, 4800e9, 450e9, 50e9, "NVIDIA's data sheet, H200; 400 Gb/s a GPU"
    ),
    # Round numbers, so that tests can reckon with them.
    "cpu": Chip("cpu", 2.0 * GIB, 1e11, 1e10, 1e9, 1e8, "invented, for tests: virtual devices of this host"),
}
MOST_CHIPS = 16384
GPUS_A_HOST = 8  # joined by NVLink; hosts by the network

# What XLA's compiler must know of a GPU that is not there, as GpuTargetConfigProto: H100 SXM and H200 share their chip.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


class Topology(NamedTuple):
    """A machine as named on the command line."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips of a slice along each axis of its torus
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def domains(self) -> int:
        """Parts between which exchanges go over the slower network: slices, or hosts of GPUs."""
        return -(-self.chips // GPUS_A_HOST) if self.chip.platform == "gpu" else self.slices

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def parse(name: str, slices: int = 1) -> Topology:
    """Reads `v5e:4x4`, `v5p:4x4x8`, `v6e:16x16`, `h100:8`, `h200:8` or `cpu:8`; imports no jax.

    Raises:
      UserError: no such name, or slices of what has none.
    """
    kind, _, shape = name.partition(":")
    known = ", ".join(CHIPS)
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology={name!r}: use KIND:CHIPS, as v5e:4x4, v5p:4x4x8 or h100:8, KIND one of {known}")
    sides = tuple(int(side) for side in shape.split("x"))
    chip = CHIPS[kind]
    axes = {"tpu": 3 if kind == "v5p" else 2, "gpu": 1, "cpu": 1}[chip.platform]
    if len(sides) != axes:
        example = {"tpu": "4x4x8" if kind == "v5p" else "4x4"}.get(chip.platform, "8")
        raise UserError(f"--topology={name!r}: chips of {kind} are counted along {axes} axes, as {kind}:{example}")
    if chip.platform == "gpu" and sides[0] > GPUS_A_HOST and sides[0] % GPUS_A_HOST:
        raise UserError(f"--topology={name!r}: more GPUs than {GPUS_A_HOST} come in hosts of {GPUS_A_HOST}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices={slices}: at least 1, and only TPUs have more; name a larger --topology")
    if math.prod(sides) * slices > MOST_CHIPS:
        raise UserError(f"--topology={name!r}: more than {MOST_CHIPS} chips: use a smaller one")
    return Topology(name, chip, sides, slices)


def prepare(topology: Topology) -> None:
    """Sets what jax and libtpu read from the environment; call it before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs, wherever this is called
    # The tests' way to compile fast would compile another program.
    os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no question to a cloud that this host is not in
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    if topology.chip.platform == "gpu":  # nothing to try kernels on, and untried ones of Triton's may not compile
        untried = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {untried}".strip()
    if topology.chip.platform != "tpu":
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.chips}".strip()


def devices(topology: Topology) -> "list[jax.Device]":
    """The devices to build a mesh of. Without a compiler for GPUs, virtual devices of this host: good for layouts only.

    Raises:
      UserError: the TPU compiler is not installed or knows no such machine.
    """
    import jax
    from jax.experimental import topologies

    platform = topology.chip.platform
    virtual: Any = jax.devices("cpu")  # this also registers the compilers that are installed
    if platform == "cpu" or not compiles(topology):
        if len(virtual) < topology.chips:
            raise UserError(
                f"{topology.name}: jax was started with {len(virtual)} devices; plan in a process of its own"
            )
        return virtual[: topology.chips]
    if platform == "gpu":
        shape = f"1x{topology.domains}x{topology.chips // topology.domains}"
        return topologies.get_topology_desc("", "cuda", target_config=_target(topology), topology=shape).devices
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"{topology.name}: the TPU compiler is missing: pip install 'uae_jax[tpu]' (no TPU needed)")
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **more).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology.name!r}: the compiler knows no such machine: {error}") from None
    return sorted(found, key=lambda device: getattr(device, "slice_index", None) or 0)


def _target(topology: Topology) -> str:
    kind = topology.name.partition(":")[0].upper()
    memory = topology.chip.hbm / GPU_MEMORY_SHARE
    return _HOPPER.format(bandwidth=topology.chip.hbm_bandwidth, memory=memory, name=f"NVIDIA {kind}")


def domain(device: "jax.Device") -> int:
    """The slice of a chip, or the host of a GPU."""
    if device.platform == "gpu":
        return device.id // GPUS_A_HOST
    return getattr(device, "slice_index", None) or 0


def compiles(topology: Topology) -> bool:
    """Whether a compiler for the machine is at hand, or missing one is an error (TPU)."""
    plugins = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)]
    return topology.chip.platform != "gpu" or bool(plugins)
