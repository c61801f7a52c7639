"""Several processes that train as one: joining, agreeing, telling each other apart, and what the first alone does.

Every process runs the same program; what one of them calls here, all must call, in the same order. In a run of one
process all of it is free.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from uae_jax.errors import UserError

_SHOWN = 3  # differences named in one error


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def gathered(value: Any) -> list[Any]:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(make: Callable[[], Any]) -> Any:
    """The JSON value that `make()` gives in the first process; the others do not call it."""
    return gathered(make() if first() else None)[0]


def on_first(write: Callable[[], None]) -> None:
    """Calls `write` in the first process; all go on when it is done, and find what it wrote in a shared folder."""
    from_first(write)


def acquaint(mesh: Mesh) -> None:
    """One small collective along every choice of the mesh's axes, before anything large is compiled.

    The processes of a collective have 30 s to meet when they do for the first time (gloo, on CPU), and one may have to
    compile for longer than another that finds the program in its cache.
    """
    if jax.process_count() == 1:
        return
    names = [name for name, size in mesh.shape.items() if size > 1]
    everywhere = NamedSharding(mesh, P(tuple(names)))
    ones = jax.make_array_from_callback((mesh.size,), everywhere, np.ones(mesh.size).__getitem__)
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            rest = tuple(name for name in names if name not in axes)
            total = functools.partial(jax.lax.psum, axis_name=axes)
            summed = jax.shard_map(total, mesh=mesh, in_specs=P(tuple(names)), out_specs=P(rest))
            jax.block_until_ready(jax.jit(summed)(ones))


def to_host(tree: Any) -> Any:
    """Arrays of the mesh as NumPy arrays, whole in every process, wherever their parts lie."""

    def whole(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(whole, tree)


def fingerprint(config: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What makes processes compile the same programs and go through the same steps, as {name: JSON value}.

    Args:
      config: of the run, with dotted names.
      environment: `runtime.environment`'s.
    """
    package = Path(__file__).parent
    found = {f"config.{name}": value for name, value in config.items()}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package.parent).as_posix()
        found[f"the code in {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    found |= {f"the version of {name}": environment[name] for name in ("jax", "jaxlib")}
    found["the kind of device"] = environment["devices"]["kind"]
    found["the number of devices of a process"] = jax.local_device_count()
    return found | {f"the variable {name}": value for name, value in environment["flags"].items()}


def check_same(mine: dict[str, Any]) -> None:
    """Refuses processes that would not run the same program.

    Raises:
      UserError: in every process; names the first process that differs from process 0, what differs, and both values.
    """
    everyone = gathered(mine)
    absent = "(unset)"
    for process, theirs in enumerate(everyone):
        differences = [
            f"{name} is {theirs.get(name, absent)!r} there, {everyone[0].get(name, absent)!r} in process 0"
            for name in everyone[0] | theirs
            if theirs.get(name, absent) != everyone[0].get(name, absent)
        ]
        if differences:
            more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UserError(
                f"process {process} of {len(everyone)} would run another program: {'; '.join(differences[:_SHOWN])}"
                f"{more}; start all of them with the same command, code and packages"
            )


def check_shared(workdir: Path) -> None:
    """Refuses a workdir that is not one folder for all processes.

    Raises:
      UserError: in every process, if one of them does not see what the first has written there (config.json).
    """
    path = workdir / "config.json"
    written = from_first(path.read_text)
    seen = path.is_file() and path.read_text() == written
    missing = [process for process, sees in enumerate(gathered(seen)) if not sees]
    if missing:
        raise UserError(
            f"process {missing[0]} does not see what process 0 writes to {workdir}: "
            "choose a --workdir in a folder that all hosts share"
        )
