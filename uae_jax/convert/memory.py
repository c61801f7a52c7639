"""Does a model's weights' memory suffice? Asked before anything is read."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from uae_jax.convert.table import Entry, param_shape
from uae_jax.errors import UserError
from uae_jax.sharding import Rules, param_spec

GIB = 2**30


def needed(table: list[Entry], dtype: Any, mesh: Mesh | None, rules: Rules) -> int:
    """Bytes that the parameters take on each device of the mesh (on the host, without one)."""
    shapes = {entry.path: param_shape(entry) for entry in table}
    if mesh is not None:
        shapes = {
            path: NamedSharding(mesh, param_spec(path, shape, mesh.shape, rules)).shard_shape(shape)
            for path, shape in shapes.items()
        }
    return sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize


def host_available() -> int | None:
    """Bytes of memory that this process may still take; None where that is not known."""
    found = []
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        found += [int(available[1]) * 1024] if available else []
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        found += [int(limit)] if limit.isdigit() else []
    except OSError:
        pass
    return min(found, default=None)


def available(mesh: Mesh | None) -> int | None:
    """Bytes that are free on each device of the mesh; virtual devices on the CPU share the host's."""
    if mesh is None:
        return host_available()
    devices = list(mesh.local_devices)
    if devices[0].platform == "cpu":
        host = host_available()
        return None if host is None else host // len(devices)
    stats = devices[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def check(where: str, table: list[Entry], dtype: Any, mesh: Mesh | None, rules: Rules) -> None:
    """Raises UserError where the parameters alone would not fit."""
    need, free = needed(table, dtype, mesh, rules), available(mesh)
    if free is None or need <= free:
        return
    count = sum(math.prod(param_shape(entry)) for entry in table)
    what = f"{where}: {count / 1e9:.2f} billion parameters in {np.dtype(dtype).name} need {need / GIB:.1f} GiB"
    if mesh is None:
        raise UserError(f"{what} of memory, {free / GIB:.1f} GiB are available: use a larger machine")
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    raise UserError(
        f"{what} on each device of the mesh ({axes}), {free / GIB:.1f} GiB are available there: "
        "raise config.mesh.fsdp, set config.dtype=bfloat16, or use more or larger devices"
    )
