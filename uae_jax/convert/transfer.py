"""Model folders in and out. One format serves both sides: that of Hugging Face.

An import is a checked copy, and so is an export; both go through the table of names tensor by tensor, so that nothing
but what the model knows can pass. The folder keeps names (the key layout), types and bits of the tensors that it had,
however many files they lay in; config.json, tokenizer and processor files are copied as they stand. An export of a
trained run is that copy of the weights it started from, with what was trained put in its place. Tensors that a release
carries and its model never reads (`Architecture.unused`) are copied as they stand.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uae_jax import storage
from uae_jax.convert import files, folder, lora, pooled
from uae_jax.convert import table as tables
from uae_jax.errors import UserError

# What lies beside the weights of a model: config.json, tokenizer, processors, chat template, licence, and the pooled
# vector of a decoder. No code.
_COMPANIONS = (".json", ".txt", ".jinja", ".model")
_NAMES = ("LICENSE", "NOTICE", pooled.FILE)


class Trained(NamedTuple):
    """What a run has changed of a model: whole parameters and adapters (`lora`), by '/'-joined path."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    alpha: float  # of the adapters


_NO_LEAVES: dict[str, np.ndarray] = {}
NOTHING = Trained({}, _NO_LEAVES.__getitem__, 1.0)


def copy_model(source: Path, target: Path, trained: Trained = NOTHING, shard_bytes: int = files.SHARD_BYTES) -> str:
    """Writes the model of `source`, with what was trained, to the new folder `target`.

    Values are cast to the type in which `source` stores the tensor. One parameter at a time is on the host.

    Args:
      source: model folder, which is checked first (`folder.open_model`).
      target: does not exist, or is empty; appears when all is written.
      trained: replaces the weights of `source`, or adapts them.
      shard_bytes: most bytes a file.

    Returns:
      A line that says what was written.

    Raises:
      UserError: `source` is no such model, `trained` belongs to another, values that are not finite in the stored
        type, or `target` cannot be written.
    """
    found = folder.open_model(source)
    _refuse_strangers(found, trained)
    specs = {
        name: files.Spec(found.tensors[canonical].dtype, found.tensors[canonical].shape)
        for entry in found.table
        for canonical in tables.flat_names(entry.names)
        for name in found.written[canonical]
    }
    specs |= {name: files.Spec(tensor.dtype, tensor.shape) for name, tensor in found.unused.items()}
    with storage.new_folder(target) as partial:
        tensors = itertools.chain(_tensors(found, trained), found.unused.items())
        names = files.write(partial, specs, tensors, found.stem, shard_bytes)
        copy_companions(source, partial)
    return f"{found.architecture}, {len(specs)} tensors in {len(names)} file{'s'[: len(names) > 1]}"


def export_adapter(source: Path, target: Path, trained: Trained) -> str:
    """Writes the adapters of a run that started from the model folder `source` to the new folder `target`.

    Those of a captioner as PEFT does, those of a DiT as diffusers does.

    Returns:
      A line that says what was written. Raises UserError as `copy_model` does, and where there are no adapters.
    """
    found = folder.open_model(source)
    _refuse_strangers(found, trained)
    whole = [path for path in trained.shapes if path.rpartition("/")[2] not in lora.LEAVES]
    if whole or not trained.shapes:
        raise UserError("--adapter: this run trained whole parameters, no adapters: export it without --adapter")
    with storage.new_folder(target) as partial:
        if found.architecture in pooled.TOWERS:
            count = lora.write_diffusers(partial, found.table, trained.shapes, trained.read, trained.alpha)
        else:
            count = lora.write_adapter(
                partial,
                found.table,
                trained.shapes,
                trained.read,
                trained.alpha,
                str(source.resolve()),
                folder.ARCHITECTURES[found.architecture].module_name,
            )
    return f"adapters of {count} linear layers"


def _refuse_strangers(found: folder.Checkpoint, trained: Trained) -> None:
    """Raises UserError that lists every trained leaf that has no place in the model."""
    expected = {entry.path: tables.param_shape(entry) for entry in found.table}
    ranks = {shape[-1] for path, shape in trained.shapes.items() if path.endswith("/lora_a")}
    for path in [path for path in expected if path.endswith("/kernel")]:
        names = lora.paths(path)
        if any(name in trained.shapes for name in names):
            expected |= zip(names, lora.shapes(expected[path], next(iter(ranks), 0)), strict=True)
    problems = [
        f"{path}: expected {expected.get(path, 'nothing')}, found {shape}"
        for path, shape in trained.shapes.items()
        if expected.get(path) != shape
    ]
    problems += [f"{path}: missing" for path in expected if path.endswith(lora.LEAVES) and path not in trained.shapes]
    if problems:
        raise UserError(f"what was trained does not fit {found.folder}: " + "; ".join(sorted(problems)))


def _tensors(found: folder.Checkpoint, trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors with the names they are written under."""
    for entry in found.table:
        whole = trained.read(entry.path) if entry.path in trained.shapes else None
        adapter = None
        if entry.path.endswith("/kernel") and lora.paths(entry.path)[0] in trained.shapes:
            adapter = [trained.read(path) for path in lora.paths(entry.path)]
        for index, name in tables.indexed(entry.names):
            tensor = found.tensors[name]
            if whole is not None or adapter is not None:
                value = entry.transform.to_jax(tensor) if whole is None else whole[index]
                if adapter is not None:
                    value = lora.merge(value, adapter[0][index], adapter[1][index], trained.alpha)
                changed = entry.transform.to_torch(value, entry.shape).astype(tensor.dtype)
                if not np.isfinite(changed).all():
                    raise UserError(f"trained values of {name} are not finite in {tensor.dtype}: nothing is exported")
                tensor = changed
            for written in found.written[name]:
                yield written, tensor


def copy_companions(source: Path, target: Path) -> None:
    """Copies what lies beside the weights of a model folder: configs, tokenizer, processors, licence."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COMPANIONS or path.name.startswith(_NAMES)
        if path.is_file() and wanted and not path.name.endswith(".index.json"):
            with open(path, "rb") as before, open(target / path.name, "wb") as after:
                shutil.copyfileobj(before, after)
                after.flush()
                os.fsync(after.fileno())
