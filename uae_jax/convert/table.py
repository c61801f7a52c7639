"""Name tables: how the tensors of a Hugging Face checkpoint and our parameters correspond, for both directions.

A model's `weights.py` returns a list of `Entry`. `load` reads a tree of parameters out of a mapping of tensors, `save`
writes the mapping back; both use the same list, so that a round trip is the identity. Both are strict: whatever is
missing, left over, matched twice or of the wrong shape is reported at once, with expected and found shapes.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from uae_jax.errors import UserError

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout; `to_jax` maps torch's array to ours, `to_torch` back (given torch's shape)."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


KEEP = Transform(lambda x: x, lambda x, shape: x.reshape(shape))
# torch Linear [out, in] <-> flax Dense kernel [in, out]
LINEAR = Transform(lambda x: x.T, lambda x, shape: x.T)
# torch Conv2d [O, I, H, W] <-> flax Conv kernel [H, W, I, O]
CONV2D = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x, shape: x.transpose(3, 2, 0, 1))
# A convolution whose stride is its kernel size, as a matrix over patches: [O, C, (T), H, W] <-> [C*(T)*H*W, O]
PATCHES = Transform(lambda x: x.reshape(x.shape[0], -1).T, lambda x, shape: x.T.reshape(shape))

# A name, or a (nested) tuple of names whose tensors are stacked along new leading axes (layers that are scanned).
Names = str | tuple["Names", ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its '/'-joined path in our tree, its name(s) in the checkpoint, and the shape found there."""

    path: str
    names: Names
    shape: tuple[int, ...]
    transform: Transform = KEEP


def layers(template: str, indices: Iterable[int]) -> tuple[str, ...]:
    """`layers("h.{}.w", range(2))` -> `("h.0.w", "h.1.w")`."""
    return tuple(template.format(i) for i in indices)


def flat_names(names: Names) -> list[str]:
    """All checkpoint names of an entry, in stacking order."""
    return [names] if isinstance(names, str) else [leaf for name in names for leaf in flat_names(name)]


def param_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of a parameter in our tree: stacking axes, then its tensor's shape as transformed."""
    stacked: list[int] = []
    names = entry.names
    while not isinstance(names, str):
        stacked.append(len(names))
        names = names[0]
    view = np.broadcast_to(np.float32(0), entry.shape)  # takes no memory
    return (*stacked, *entry.transform.to_jax(view).shape)


def load(table: list[Entry], tensors: Mapping[str, np.ndarray], where: str = "checkpoint") -> Params:
    """Builds the parameter tree of `table` from `tensors` (any lazy mapping of arrays).

    Raises:
      UserError: lists every missing, unexpected, doubly used or wrongly shaped tensor.
    """
    uses = collections.Counter(name for entry in table for name in flat_names(entry.names))
    paths = collections.Counter(entry.path for entry in table)
    shapes = {name: entry.shape for entry in table for name in flat_names(entry.names)}
    problems = [f"used twice: {name}" for name, n in uses.items() if n > 1]
    problems += [f"set twice: {path}" for path, n in paths.items() if n > 1]
    problems += [f"missing: {name} {shapes[name]}" for name in uses if name not in tensors]
    problems += [f"unexpected: {name} {tuple(tensors[name].shape)}" for name in tensors if name not in uses]
    problems += [
        f"shape of {name}: expected {shape}, found {tuple(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if problems:
        raise UserError(f"{where} does not fit the model: " + "; ".join(sorted(problems)))

    def stack(names: Names, transform: Transform) -> np.ndarray:
        if isinstance(names, str):
            return transform.to_jax(np.asarray(tensors[names]))
        return np.stack([stack(name, transform) for name in names])

    flat = {entry.path: stack(entry.names, entry.transform) for entry in table}
    return traverse_util.unflatten_dict(flat, sep="/")


def save(table: list[Entry], params: Params) -> dict[str, np.ndarray]:
    """Inverse of `load`: the checkpoint's tensors, contiguous, under their names.

    Raises:
      UserError: lists every parameter that is missing, unexpected or of the wrong shape.
    """
    flat = {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}
    shapes = {entry.path: param_shape(entry) for entry in table}
    problems = [f"missing: {path} {shapes[path]}" for path in shapes if path not in flat]
    problems += [f"unexpected: {path} {value.shape}" for path, value in flat.items() if path not in shapes]
    problems += [
        f"shape of {path}: expected {shape}, found {flat[path].shape}"
        for path, shape in shapes.items()
        if path in flat and flat[path].shape != shape
    ]
    if problems:
        raise UserError("parameters do not fit the table: " + "; ".join(sorted(problems)))

    def unstack(names: Names, value: np.ndarray, entry: Entry) -> Iterable[tuple[str, np.ndarray]]:
        if isinstance(names, str):
            yield names, np.array(entry.transform.to_torch(value, entry.shape), order="C")
        else:
            for name, part in zip(names, value, strict=True):
                yield from unstack(name, part, entry)

    return {name: x for entry in table for name, x in unstack(entry.names, flat[entry.path], entry)}
