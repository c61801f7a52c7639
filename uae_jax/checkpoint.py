"""Checkpoints of the training state (orbax, asynchronous), and the record of the configuration they belong to.

Leaves are stored under their '/'-joined paths, so that a checkpoint is read without the classes that wrote it and a
leaf that does not fit is named. A save is written to a temporary directory and renamed when complete: one that was
interrupted is not seen again.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax import traverse_util

from uae_jax.errors import UserError
from uae_jax.storage import close_at_exit, storage_errors, write_atomic

_SHOWN = 3  # differences named in one error


def _quiet(record: logging.LogRecord) -> bool:
    """Drops orbax's log, failures included: they reach us as exceptions."""
    return "orbax" not in record.pathname


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree: Any) -> dict[str, Any]:
    """{'params/dense/kernel': leaf}, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same '/'-joined path")
    return named


def _abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What is stored of a leaf: a typed key goes as its words; no sharding means the first device."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=sharding)


def _key_impl(leaf: jax.ShapeDtypeStruct) -> Any:
    """The generator of an abstract key: `jax.random.key_impl` wants an array, so ask while tracing."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _show(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


def abstract(state: Any) -> Any:
    """What a checkpoint restores into: shape, type and place of every array."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class Checkpointer:
    """Saves a pytree of arrays every `every` steps, keeps the newest `keep`, restores the newest complete one.

    Use as a context manager, or call `close`: a save runs behind the training, and a fault of it (disk full) is raised
    by the next `save` or by `close`. Every process of a multi-host run makes the same calls.
    """

    def __init__(self, directory: str | os.PathLike, every: int, keep: int = 2):
        """`directory` is made where missing. Raises UserError where that is impossible."""
        absl_logging.get_absl_logger().addFilter(_quiet)
        # What a failed save leaves unread in its event loop; the failure itself is raised here.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.directory = os.path.abspath(directory)
        self.every = every
        with storage_errors(self.directory):
            os.makedirs(self.directory, exist_ok=True)  # orbax takes a file for a folder until the first save
            self._manager = ocp.CheckpointManager(
                self.directory,
                item_handlers=ocp.StandardCheckpointHandler(),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        close_at_exit(self.close, kind)

    def close(self) -> None:
        """Waits for the save in progress. Raises UserError if it failed; the checkpoint before it stands."""
        with storage_errors(self.directory):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def save(self, step: int, state: Any, force: bool = False) -> bool:
        """Starts a save when `step` is a multiple of `every`, or forced; never the same step twice.

        `state` may be donated as soon as this returns. Raises UserError if this save, or the one before, failed.

        Args:
          step: updates done.
          state: pytree of arrays; typed PRNG keys are stored as their words.
          force: save at any step (the last one, a preemption).

        Returns:
          Whether a save was started.
        """
        with storage_errors(self.directory):
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()  # returns at once, and raises what the last save met
            if (step % self.every and not force) or step in self._manager.all_steps():
                return False
            arrays = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in _named(state).items()}
            return self._manager.save(step, args=ocp.args.StandardSave(arrays), force=True)

    def restore_latest(self, abstract_state: Any) -> tuple[Any, int] | None:
        """The newest complete checkpoint, on the shardings asked for, or None where there is none.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with shardings (none: the first device), of the structure that
            was saved. The shardings, and the number of devices, are free to differ from those of the save.

        Returns:
          (state, step). Raises UserError that names each leaf whose path, shape or dtype differs, or the directory of
          a checkpoint that cannot be read.
        """
        with storage_errors(self.directory):
            self._manager.wait_until_finished()
        step = self._manager.latest_step()
        if step is None:
            return None
        path = os.path.join(self.directory, str(step))
        wanted = {name: _abstract(leaf) for name, leaf in _named(abstract_state).items()}
        try:
            stored = dict(self._manager.item_metadata(step).items())
        except Exception as error:
            raise _unreadable(path, error) from error
        differences = [
            f"{name} is {_show(stored.get(name))} there, {_show(wanted.get(name))} here"
            for name in wanted | stored
            if _show(stored.get(name)) != _show(wanted.get(name))
        ]
        if differences:
            raise UserError(
                f"checkpoint {path} does not fit this configuration: {_some(differences)}; "
                "use the configuration it was written with, or another --workdir"
            )
        try:
            arrays = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except Exception as error:
            raise _unreadable(path, error) from error
        leaves, structure = jax.tree.flatten(abstract_state)
        restored = [
            jax.random.wrap_key_data(arrays[name], impl=_key_impl(leaf)) if _is_key(leaf) else arrays[name]
            for name, leaf in zip(wanted, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, restored), step


class Leaves(NamedTuple):
    """What one checkpoint holds below a '/'-joined path."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]  # one leaf, onto the host


def open_leaves(directory: str | os.PathLike, step: int, prefix: str) -> Leaves:
    """Part of a complete checkpoint, to be read leaf by leaf on any machine.

    Args:
      directory: of the checkpoints.
      step: of the one wanted.
      prefix: 'params/' of 'params/dense/kernel'; names are then without it.

    Raises:
      UserError: (so does `read`) the checkpoint cannot be read.
    """
    absl_logging.get_absl_logger().addFilter(_quiet)
    path = os.path.join(os.path.abspath(directory), str(step), ocp.checkpoint_manager.DEFAULT_ITEM_NAME)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def read(name: str) -> np.ndarray:
        full = prefix + name
        wanted = ocp.args.PyTreeRestore(
            item={full: 0}, restore_args={full: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        try:
            return reader.restore(path, args=wanted)[full]
        except Exception as error:
            raise _unreadable(path, error) from error

    try:
        stored = dict(reader.metadata(path).item_metadata.items())
    except Exception as error:
        raise _unreadable(path, error) from error
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in stored.items() if name.startswith(prefix)}
    return Leaves(shapes, read)


def latest_step(directory: str | os.PathLike) -> int | None:
    """The newest complete checkpoint there, without touching a run that may be writing others; None without any."""
    steps = ocp.utils.checkpoint_steps(directory) if os.path.isdir(directory) else []
    return max(steps, default=None)


def _unreadable(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"checkpoint {path} cannot be read; remove it to resume from the one before: {reason}")


def _some(differences: list[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def write_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes workdir/config.json as a whole, on the first process. Raises UserError where the disk refuses."""
    if jax.process_index() == 0:
        write_atomic(Path(workdir) / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def write_environment(workdir: str | os.PathLike, environment: Mapping[str, Any]) -> None:
    """Writes workdir/environment.json, of the latest start, on the first process, and prints the compiler's flags.

    Args:
      workdir: of the run.
      environment: `runtime.environment`'s.

    Raises:
      UserError: the disk refuses.
    """
    if jax.process_index() == 0:
        for variable, flags in environment["flags"].items():
            print(f"{variable}: {flags}", flush=True)
        write_atomic(Path(workdir) / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())


def check_config(workdir: str | os.PathLike, config: Mapping[str, Any], may_differ: tuple[str, ...] = ()) -> None:
    """Refuses to go on in a workdir whose config.json is another run's. Passes where there is none.

    Args:
      workdir: of the run.
      config: nested mapping of JSON values (a tuple equals a list).
      may_differ: dotted fields, or groups of them, that a run may change ('steps', 'eval').

    Raises:
      UserError: names the workdir, the first fields that differ, both values and the remedy.
    """
    path = Path(workdir) / "config.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; choose another --workdir") from error
    try:
        before = traverse_util.flatten_dict(json.loads(text), sep=".", keep_empty_nodes=False)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path} is not a configuration; remove it or choose another --workdir") from error
    now = traverse_util.flatten_dict(json.loads(json.dumps(config)), sep=".", keep_empty_nodes=False)
    absent = "(absent)"
    differences = [
        f"{name} was {before.get(name, absent)!r}, now {now.get(name, absent)!r}"
        for name in now | before
        if before.get(name, absent) != now.get(name, absent)
        and not any(name == prefix or name.startswith(prefix + ".") for prefix in may_differ)
    ]
    if differences:
        raise UserError(
            f"{workdir} holds a run with another configuration: {_some(differences)}; "
            "choose another --workdir, or remove it"
        )
