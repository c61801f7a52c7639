"""Mesh, where parameters and batches live on it, and the decode view.

One mesh with axes (data, fsdp). Batches are split over data and fsdp; parameters over fsdp, each along its
largest dimension that divides. Arrays with axes [b, g, ...] are split along b.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from uae_jax.errors import UserError

AXES = ("data", "fsdp")
# Smaller parameters are copied to every device: splitting them saves nothing and costs a gather each.
SMALLEST_SHARDED = 2**16


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, ordered for the hardware.

    Raises:
      UserError: the axes do not multiply to the number of devices, or the batch does not divide.
    """
    devices = devices or jax.devices()
    sizes = [int(config.mesh[axis]) for axis in AXES]
    wildcards = [i for i, size in enumerate(sizes) if size == -1]
    known = math.prod(size for size in sizes if size != -1)
    described = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    misfit = len(wildcards) > 1 or known < 1 or len(devices) % known or (not wildcards and known != len(devices))
    if misfit or min(sizes) < -1:
        raise UserError(
            f"config.mesh ({described}) does not fit {len(devices)} devices: the axes must multiply to that"
        )
    for i in wildcards:
        sizes[i] = len(devices) // known
    mesh = jax.make_mesh(sizes, AXES, devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    split = {"data.batch_size / rl.microbatches": config.data.batch_size // config.rl.microbatches}
    if config.eval.enabled:
        split["eval.batch_size"] = config.eval.batch_size
    for field, size in split.items():
        if size % parts:
            raise UserError(
                f"config.{field} = {size} cannot be split over data x fsdp = {parts} devices: use a multiple of {parts}"
            )
    return mesh


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def param_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """The largest dimension that `fsdp` divides is split; small parameters are not.

    The first axis of a stack of layers is scanned over, so it is the last choice.
    """
    if fsdp == 1 or math.prod(shape) < SMALLEST_SHARDED:
        return P()
    order = sorted(range(len(shape)), key=lambda i: (len(shape) > 2 and i == 0, -shape[i]))
    for axis in order:
        if shape[axis] % fsdp == 0:
            return P(*(["fsdp" if i == axis else None for i in range(len(shape))]))
    return P()


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf: parameters, or optimizer state shaped like them."""
    return jax.tree.map(lambda x: NamedSharding(mesh, param_spec(x.shape, mesh.shape["fsdp"])), tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Moves arrays to the mesh, each to its own sharding; those of the host are the same in every process."""
    return jax.tree.map(_put, tree, param_shardings(tree, mesh))


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`device_put`, which takes neither keys nor the host's arrays to devices of other processes."""
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        # Keys are few, and whole on every device.
        words = _put(jax.random.key_data(x), replicated(sharding.mesh))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch on the mesh; every process holds all of it and hands over what its devices need."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for name, x in batch.items()}


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch of `size` that lie on this process's devices, ascending: all it has to load."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts if part is not None]))


def place_rows(batch: dict[str, np.ndarray], rows: np.ndarray, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch of `size` rows on the mesh, of which this process holds `rows` (`local_rows`) alone."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return x[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return {name: put(x) for name, x in batch.items()}


def constrain_batch(tree: Any, mesh: Mesh | None, axis: int = 0) -> Any:
    """Keeps the batch axis of activations split, whatever the weights' layout suggests to the partitioner."""
    if mesh is None:
        return tree
    spec = NamedSharding(mesh, P(*[None] * axis, AXES))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


def decode_view(params: Any, mesh: Mesh | None, dtype: Any) -> Any:
    """Weights as the token loop wants them: in the compute type, gathered once.

    With fsdp-sharded weights and scanned layers the partitioner would gather every layer again for every token; a
    constraint on the weights before the loop moves the gathers out of it.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    if mesh is None:
        return params
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)), params)
