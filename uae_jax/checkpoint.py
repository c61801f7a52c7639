"""Checkpoints of the training state (orbax, asynchronous), and the record of the configuration they belong to.

Leaves are stored under their '/'-joined paths, so that a checkpoint is read without the classes that wrote it and a
leaf that does not fit is named. A save is written to a temporary directory and renamed when complete: one that was
interrupted is not seen again. Each holds its configuration and the checksums of its files (`checksums`); one that is
damaged is passed over for the one before. Which is the newest is decided by steps, never by time. Folders of
checkpoints are local or whatever else `etils.epath` reaches (gs://).
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from flax import traverse_util

from uae_jax import checksums, hosts
from uae_jax.errors import UserError
from uae_jax.retention import Keep, Policy
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


def _items(directory: str | os.PathLike, step: int) -> epath.Path:
    """The folder in which the files of a checkpoint lie."""
    return _absolute(directory) / str(step) / ocp.checkpoint_manager.DEFAULT_ITEM_NAME


def _absolute(directory: str | os.PathLike) -> epath.Path:
    return epath.Path(directory).absolute()  # gs:// is


def newest_whole(directory: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint whose files are what was written; None where there is no checkpoint at all.

    Every file is read, by the first process alone. One that is damaged is passed over with a warning; one that an
    older version wrote, without checksums, is taken as it is, with a warning.

    Args:
      directory: of checkpoints. Nothing is written there, and a run may be adding to it.

    Raises:
      UserError: all are damaged.
    """
    found = hosts.from_first(lambda: _newest_whole(directory))
    if found == _ALL_DAMAGED:
        raise UserError(f"all checkpoints in {directory} are damaged: copy one back, or remove them all to start again")
    return None if found == _NO_CHECKPOINT else found


_NO_CHECKPOINT, _ALL_DAMAGED = -1, -2


def named(path: str | os.PathLike) -> tuple[epath.Path, int]:
    """What `config.resume` names: a workdir's (or its checkpoints/) newest that is whole, or one by its step.

    Returns:
      Its folder of checkpoints, and its step.

    Raises:
      UserError: there is none, or it is damaged.
    """
    place = _absolute(path)
    if place.name.isdigit() and int(place.name) in _complete(place.parent):
        damage = hosts.from_first(lambda: _damage(place.parent, int(place.name)))
        if damage is not None:
            raise UserError(f"config.resume: checkpoint {place} is damaged ({damage}): name another")
        return place.parent, int(place.name)
    folder = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    step = newest_whole(folder)
    if step is None:
        raise UserError(f"config.resume: {place} holds no complete checkpoint: name the workdir of a run")
    return folder, step


def config_of(directory: str | os.PathLike, step: int) -> dict[str, Any]:
    """The configuration that a checkpoint was written with; empty where it does not say."""
    record = checksums.read(_items(directory, step))
    return record.config if record is not None else {}


def _verified(folder: epath.Path) -> bool:
    """Reads every file of a checkpoint; False where it was written without checksums. Raises checksums.Damaged."""
    record = checksums.read(folder)
    if record is not None:
        checksums.verify(folder, record)
    return record is not None


def _damage(directory: str | os.PathLike, step: int) -> str | None:
    """What is wrong with a checkpoint."""
    try:
        _verified(_items(directory, step))
    except checksums.Damaged as damage:
        return str(damage)
    return None


def _newest_whole(directory: str | os.PathLike) -> int:
    steps = sorted(_complete(directory), reverse=True)
    for step, before in zip(steps, [*steps, None][1:], strict=True):
        folder = _items(directory, step)
        try:
            if not _verified(folder):
                logging.warning("checkpoint %s was written without checksums: it is used unverified", folder.parent)
            return step
        except checksums.Damaged as damage:
            then = "there is none before it" if before is None else f"the one before it is tried, of step {before}"
            logging.warning("checkpoint %s is damaged (%s): %s", folder.parent, damage, then)
    return _ALL_DAMAGED if steps else _NO_CHECKPOINT


def _complete(directory: str | os.PathLike) -> list[int]:
    folder = _absolute(directory)
    return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def restore(directory: str | os.PathLike, step: int, abstract_state: Any) -> Any:
    """A checkpoint as the state it was saved from; its files are not verified here (`newest_whole` does).

    Args:
      directory: of checkpoints; nothing is written there.
      step: of the one wanted.
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings (none: the first device), of the structure that
        was saved. The shardings, and the number of devices, are free to differ from those of the save.

    Raises:
      UserError: names each leaf whose path, shape or dtype differs, or the checkpoint where it cannot be read.
    """
    path = str(_absolute(directory) / str(step))
    wanted = {name: _abstract(leaf) for name, leaf in _named(abstract_state).items()}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        try:
            stored = dict(reader.metadata(_items(directory, step)).item_metadata.items())
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
                "use the configuration (and version) it was written with, or another --workdir"
            )
        try:
            arrays = reader.restore(_items(directory, step), args=ocp.args.StandardRestore(wanted))
        except Exception as error:
            raise _unreadable(path, error) from error
    leaves, structure = jax.tree.flatten(abstract_state)
    restored = [
        jax.random.wrap_key_data(arrays[name], impl=_key_impl(leaf)) if _is_key(leaf) else arrays[name]
        for name, leaf in zip(wanted, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, restored)


class _Recording(ocp.StandardCheckpointHandler):
    """Adds the record to a checkpoint that is complete but for its name."""

    config: Mapping[str, Any]
    metric: float | None = None

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if jax.process_index() == 0:
            checksums.write(directory, self.config, self.metric)


class Checkpointer:
    """Saves a pytree of arrays every `every` steps, keeps what `keep` says, restores the newest that is whole.

    Use as a context manager, or call `close`: a save runs behind the training, and a fault of it (disk full) is raised
    by the next `save` or by `close`. Every process of a multi-host run makes the same calls. Not for a directory in
    which another process saves: what that one is writing would be removed (`newest_whole` and `restore` only read).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        every: int,
        keep: Keep = Keep(),  # noqa: B008
        config: Mapping[str, Any] | None = None,
    ):
        """`directory` is made where missing, `config` goes into each checkpoint. UserError where that is impossible."""
        absl_logging.get_absl_logger().addFilter(_quiet)
        # What a failed save leaves unread in its event loop; the failure itself is raised here.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self.directory = _absolute(directory)
        self.every, self.keep = every, keep
        self._values: dict[int, float] = {}
        self._handler = _Recording()
        self._handler.config = config or {}
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(ocp.checkpoint_manager.DEFAULT_ITEM_NAME, ocp.args.StandardSave, self._handler)
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)  # orbax takes a file for a folder until the first save
            hosts.on_first(self._remove_halves)
            for step in _complete(self.directory) if keep.best else ():
                self._remember(step)
            self._manager = ocp.CheckpointManager(
                self.directory,
                handler_registry=registry,
                options=ocp.CheckpointManagerOptions(preservation_policy=Policy(keep, self._values)),
            )

    def _remove_halves(self) -> None:
        """Removes what killed saves left; orbax would in a thread that may outlive `close` and meet the next."""
        for half in ocp.utils.tmp_checkpoints(self.directory):
            half.get().rmtree()

    def _remember(self, step: int) -> None:
        try:
            record = checksums.read(_items(self.directory, step))
        except checksums.Damaged:
            return
        if record is not None and record.metric is not None:
            self._values[step] = record.metric

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # closing waits for the other processes, and they for this one
        close_at_exit(self.close, kind)

    def close(self) -> None:
        """Waits for the save in progress. Raises UserError if it failed; the checkpoint before it stands."""
        with storage_errors(self.directory):
            try:
                self._manager.wait_until_finished()
            finally:
                self._manager.close()

    def save(self, step: int, state: Any, force: bool = False, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts a save when `step` is a multiple of `every`, or forced; never the same step twice.

        `state` may be donated as soon as this returns. Raises UserError if this save, or the one before, failed.

        Args:
          step: updates done.
          state: pytree of arrays; typed PRNG keys are stored as their words.
          force: save at any step (the last one, a preemption).
          metrics: of this step, to find the best.

        Returns:
          Whether a save was started.
        """
        with storage_errors(self.directory):
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()  # returns at once, and raises what the last save met
            if (step % self.every and not force) or step in self._manager.all_steps():
                return False
            self._manager.wait_until_finished()  # orbax would; the handler serves one save at a time
            self._handler.metric = self.keep.value(metrics or {})
            if self._handler.metric is not None:
                self._values[step] = self._handler.metric
            arrays = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in _named(state).items()}
            return self._manager.save(step, args=ocp.args.StandardSave(arrays), force=True)

    def restore_latest(self, abstract_state: Any) -> tuple[Any, int] | None:
        """The newest checkpoint that is whole, on the shardings asked for, or None where there is none.

        Damaged ones that are newer get another name (damaged-STEP) once it is restored.

        Args:
          abstract_state: see `restore`.

        Returns:
          (state, step). Raises UserError: see `newest_whole` and `restore`.
        """
        with storage_errors(self.directory):
            self._manager.wait_until_finished()
            step = newest_whole(self.directory)
            if step is None:
                return None
            state = restore(self.directory, step, abstract_state)
            if damaged := [other for other in self._manager.all_steps() if other > step]:
                self._set_aside(damaged)
        return state, step

    def _set_aside(self, steps: Sequence[int]) -> None:
        def rename() -> None:
            for step in steps:
                names = (f"damaged-{step}" + (f"-{i}" if i else "") for i in range(1000))
                free = next(self.directory / name for name in names if not (self.directory / name).exists())
                (self.directory / str(step)).rename(free)

        hosts.on_first(rename)
        self._manager.reload()


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
    path = _items(directory, step)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def read(name: str) -> np.ndarray:
        full = prefix + name
        wanted = ocp.args.PyTreeRestore(
            item={full: 0}, restore_args={full: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
        )
        try:
            return reader.restore(path, args=wanted)[full]
        except Exception as error:
            raise _unreadable(str(path), error) from error

    try:
        stored = dict(reader.metadata(path).item_metadata.items())
    except Exception as error:
        raise _unreadable(str(path), error) from error
    shapes = {name.removeprefix(prefix): tuple(x.shape) for name, x in stored.items() if name.startswith(prefix)}
    return Leaves(shapes, read)


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


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """{dotted field: 'x was 1, now 2'} of two configurations; a tuple equals a list.

    Args:
      before: nested mapping of JSON values.
      now: another.
      defaults: a field that `before` lacks counts as having this value: fields are added by newer versions.

    Raises:
      ValueError: one of them is no configuration.
    """
    try:
        flat = [
            traverse_util.flatten_dict(json.loads(json.dumps(one)), sep=".", keep_empty_nodes=False)
            for one in (before, now, defaults or {})
        ]
    except AssertionError as error:
        raise ValueError(str(error)) from error
    absent = "(absent)"
    old = {name: flat[2].get(name, absent) for name in flat[1]} | flat[0]
    new = dict.fromkeys(flat[0], absent) | flat[1]
    return {
        name: f"{name} was {old[name]!r}, now {new[name]!r}" for name in flat[1] | flat[0] if old[name] != new[name]
    }


def check_config(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    may_differ: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuses to go on in a workdir whose config.json is another run's. Passes where there is none.

    Args:
      workdir: of the run.
      config: nested mapping of JSON values (a tuple equals a list).
      may_differ: dotted fields, or groups of them, that a run may change ('steps', 'eval').
      defaults: of fields that an older version did not write.

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
        before = json.loads(text)
        differences(before, {})
    except ValueError as error:
        raise UserError(f"{path} is not a configuration; remove it or choose another --workdir") from error
    refuse_another(str(workdir), before, config, may_differ, defaults)


def refuse_another(
    place: str,
    before: Mapping[str, Any],
    config: Mapping[str, Any],
    may_differ: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuses to go on with a configuration that differs from `before`, which `place` holds; see `check_config`."""
    refused = [
        said
        for name, said in differences(before, config, defaults).items()
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in may_differ)
    ]
    if refused:
        raise UserError(
            f"{place} holds a run with another configuration: {_some(refused)}; choose another --workdir, or remove it"
        )
