"""Name tables: how the tensors of a Hugging Face checkpoint and our parameters correspond, for both directions.

A model's `weights.py` returns a list of `Entry`. `load` reads a tree of parameters out of a mapping of tensors (`place`
straight onto a mesh), `save` writes the mapping back; all use the same list, so that a round trip is the identity. They
are strict: whatever is missing, left over, matched twice or of the wrong shape is reported at once, with expected and
found shapes, before anything is transposed.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from uae_jax.errors import UserError
from uae_jax.sharding import Rules, param_spec

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
    return [name for _, name in indexed(names)]


def param_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of a parameter in our tree: stacking axes, then its tensor's shape as transformed."""
    stacked: list[int] = []
    names = entry.names
    while not isinstance(names, str):
        stacked.append(len(names))
        names = names[0]
    view = np.broadcast_to(np.float32(0), entry.shape)  # takes no memory
    return (*stacked, *entry.transform.to_jax(view).shape)


def indexed(names: Names, index: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each checkpoint name of an entry with its place on the stacking axes; `()` where nothing is stacked."""
    if isinstance(names, str):
        yield index, names
    else:
        for i, part in enumerate(names):
            yield from indexed(part, (*index, i))


def mismatches(table: list[Entry], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors of these shapes from being the table's: one phrase each; empty when they fit."""
    uses = collections.Counter(name for entry in table for name in flat_names(entry.names))
    paths = collections.Counter(entry.path for entry in table)
    expected = {name: entry.shape for entry in table for name in flat_names(entry.names)}
    return [
        *(f"used twice: {name}" for name, n in uses.items() if n > 1),
        *(f"set twice: {path}" for path, n in paths.items() if n > 1),
        *(f"missing: {name} {expected[name]}" for name in uses if name not in shapes),
        *(f"unexpected: {name} {shape}" for name, shape in shapes.items() if name not in uses),
        *(
            f"shape of {name}: expected {shape}, found {shapes[name]}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ),
    ]


def refuse(problems: list[str], where: str) -> None:
    """Raises UserError that lists all problems, if there are any."""
    if problems:
        raise UserError(f"{where} does not fit the model: " + "; ".join(sorted(problems)))


def read(entry: Entry, tensors: Mapping[str, np.ndarray], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """A slice of a parameter, copied out of `tensors` layer by layer.

    Args:
      entry: of the table.
      tensors: views of the checkpoint; transposing or slicing one reads nothing yet.
      index: one slice (of step 1) for each axis of the parameter.
      dtype: of the result.
    """

    def fill(out: np.ndarray, names: Names, index: tuple[slice, ...]) -> None:
        if isinstance(names, str):
            out[...] = entry.transform.to_jax(tensors[names])[index]
        else:
            for i, name in enumerate(names[index[0]]):
                fill(out[i, ...], name, index[1:])

    sizes = zip(param_shape(entry), index, strict=True)
    out = np.empty([len(range(*part.indices(size))) for size, part in sizes], dtype)
    fill(out, entry.names, index)
    return out


def load(table: list[Entry], tensors: Mapping[str, np.ndarray], where: str = "checkpoint", dtype: Any = None) -> Params:
    """Builds the parameter tree of `table` on the host, from any lazy mapping of arrays.

    Args:
      table: of the model.
      tensors: under the table's names.
      where: they come from, for errors.
      dtype: of the parameters; by default as stored.

    Raises:
      UserError: lists every missing, unexpected, doubly used or wrongly shaped tensor.
    """
    refuse(mismatches(table, {name: tuple(tensors[name].shape) for name in tensors}), where)
    flat = {}
    for entry in table:
        stored = tensors[flat_names(entry.names)[0]].dtype
        everything = (slice(None),) * len(param_shape(entry))
        flat[entry.path] = read(entry, tensors, everything, stored if dtype is None else dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def place(table: list[Entry], tensors: Mapping[str, np.ndarray], mesh: Mesh, rules: Rules, dtype: Any) -> Params:
    """As `load`, with every parameter on the mesh, where the model's sharding rules say.

    The host holds one device's part of one parameter at a time.

    `tensors` must fit the table (`mismatches`).
    """

    def onto_mesh(entry: Entry) -> jax.Array:
        shape = param_shape(entry)
        sharding = NamedSharding(mesh, param_spec(entry.path, shape, mesh.shape, rules))
        devices: dict[tuple, list[jax.Device]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            devices.setdefault(tuple((part.start, part.stop) for part in index or ()), []).append(device)
        parts = []
        for bounds, copies in devices.items():
            part = read(entry, tensors, tuple(slice(*ends) for ends in bounds), dtype)
            parts += [jax.block_until_ready(jax.device_put(part, device)) for device in copies]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return traverse_util.unflatten_dict({entry.path: onto_mesh(entry) for entry in table}, sep="/")


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
    return {
        name: np.array(entry.transform.to_torch(flat[entry.path][index], entry.shape), order="C")
        for entry in table
        for index, name in indexed(entry.names)
    }
