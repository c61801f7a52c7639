"""Mesh, rules, where parameters and batches live on it, and the decode view.

One mesh with four axes, any of them of size 1:

    slice   copies of the weights, one a slice; only gradients cross the network between slices
    data    copies of the weights within a slice
    fsdp    weights stored in parts, gathered to be used
    tensor  weights used in parts: heads and the width of MLPs, as each model's rules say

A batch [b, g, ...] is split over slice, data and fsdp: along b, and those axes that do not divide b along g. A model
declares beside its table of weights which `Split` each of its parameters takes, as (regular expression, split) pairs.
"""

import enum
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from uae_jax.errors import UserError

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]
HOST = "pinned_host"  # memory of a host that its devices reach by themselves
# Smaller parameters are copied to every device: splitting them saves nothing and costs a gather each.
SMALLEST_SHARDED = 2**16


class Split(enum.Enum):
    """How the mesh splits a parameter. Its largest other dimension that divides is stored in parts over fsdp."""

    COLUMNS = "tensor splits the last dimension: outputs of a kernel"
    ROWS = "tensor splits the last but one: inputs of a kernel, entries of a table"
    GATHERED = "stored in parts over fsdp and tensor, whole on every device that uses it"
    COPIED = "stored whole by every device: norms, biases, tokens"


# (pattern, split): the first pattern that a '/'-joined path ends with, from the start or from behind a '/', decides.
Rules = tuple[tuple[str, Split], ...]

# Norms, biases and single tokens, under the names that they have in all models.
COPIED: Rules = (
    (
        r"(?:.*/)?(?:scale|scale1|scale2|bias|logit_scale|logit_bias|cls_token|mask_token|register_tokens"
        r"|class_embedding|probe)",
        Split.COPIED,
    ),
)


def divided(split: Split, size: int, tensor: int) -> Split:
    """`split` where `tensor` divides `size` (a number of heads, a width), else GATHERED: each device does all of it."""
    return split if size % tensor == 0 else Split.GATHERED


def below(name: str, rules: Rules) -> Rules:
    """The rules of a model whose parameters lie under `name` in a larger tree."""
    return tuple((f"{name}/(?:{pattern})", split) for pattern, split in rules)


def split_of(path: str, rules: Rules) -> Split:
    """What the rules say of a parameter, or of an adapter (`lora_a`, `lora_b`) beside a kernel.

    Raises:
      ValueError: no rule matches; names the parameter.
    """
    parent, _, leaf = path.rpartition("/")
    if leaf in ("lora_a", "lora_b"):
        # x @ a @ b is split as x @ kernel is: only the side that the rank has no part in.
        kept = Split.ROWS if leaf == "lora_a" else Split.COLUMNS
        found = split_of(f"{parent}/kernel", rules)
        return found if found is kept else Split.GATHERED
    for pattern, split in rules:
        if re.search(rf"(?:^|/)(?:{pattern})$", path):
            return split
    raise ValueError(f"no sharding rule matches the parameter {path}: add one beside its model's weight table")


def _used(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], rules: Rules) -> list[Any]:
    """What splits each dimension of a parameter while it is used: tensor, or nothing."""
    dims: list[Any] = [None] * len(shape)
    split = split_of(path, rules)
    if sizes["tensor"] > 1 and split in (Split.COLUMNS, Split.ROWS) and math.prod(shape) >= SMALLEST_SHARDED:
        at = len(shape) - (1 if split is Split.COLUMNS else 2)
        if shape[at] % sizes["tensor"]:
            raise ValueError(f"the rule of {path} splits {shape[at]} over tensor={sizes['tensor']}")
        dims[at] = "tensor"
    return dims


def param_spec(path: str, shape: tuple[int, ...], sizes: Mapping[str, int], rules: Rules) -> P:
    """Where a parameter is stored.

    Args:
      path: '/'-joined; its end is matched against the rules.
      shape: of the parameter.
      sizes: of the mesh's axes (`mesh.shape`).
      rules: of the tree that it is in.

    Raises:
      ValueError: no rule matches.
    """
    if split_of(path, rules) is Split.COPIED or math.prod(shape) < SMALLEST_SHARDED:
        return P()
    dims = _used(path, shape, sizes, rules)
    storing = ("fsdp",) if "tensor" in dims else ("fsdp", "tensor")
    # The first axis of a stack of layers is scanned over, so it is the last choice.
    order = sorted(range(len(shape)), key=lambda i: (len(shape) > 2 and i == 0, -shape[i]))
    for wanted in (storing, ("fsdp",)):
        axes = tuple(axis for axis in wanted if sizes[axis] > 1)
        for i in order if axes else ():
            if dims[i] is None and shape[i] % math.prod(sizes[axis] for axis in axes) == 0:
                dims[i] = axes if len(axes) > 1 else axes[0]
                return P(*dims)
    return P(*dims) if "tensor" in dims else P()


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """A NamedSharding for every leaf: parameters, optimizer state (split as its parameters are), and scalars.

    Raises:
      ValueError: no rule matches a leaf, which is named.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(_path(path), leaf.shape, mesh.shape, rules) if leaf.ndim else P())

    return jax.tree_util.tree_map_with_path(of, tree)


def place(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Moves arrays to the mesh, each to its own sharding; those of the host are the same in every process.

    What `offloaded` put into host memory stays there.
    """
    return jax.tree.map(_put, tree, param_shardings(tree, mesh, rules))


def copied(tree: Any, mesh: Mesh) -> Any:
    """Arrays, the same in every process, whole on every device."""
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, P())), tree)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    """`device_put`, which takes neither keys nor the host's arrays to devices of other processes."""
    if isinstance(x, jax.Array) and x.sharding.memory_kind == HOST:
        sharding = sharding.with_memory_kind(HOST)
    if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        # Keys are few, and whole on every device.
        words = _put(jax.random.key_data(x), NamedSharding(sharding.mesh, P()))
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def made(function: Callable[..., Any], *args: Any, mesh: Mesh, rules: Rules) -> Any:
    """`function(*args)`, compiled so that every leaf is made where it belongs: no device ever holds all of it."""
    shardings = param_shardings(jax.eval_shape(function, *args), mesh, rules)
    return jax.jit(function, out_shardings=shardings)(*args)


def jit_step(step: Callable[..., Any], state: Any, mesh: Mesh) -> Any:
    """`step(state, ...) -> state, metrics`, to be compiled with its state donated and put back where it was.

    Left to itself the compiler may store a parameter elsewhere than it found it: nothing would be donated, and the next
    step be another program.

    Args:
      state: arrays, or their shapes with shardings. Those that `offloaded` put into host memory come over to be used.
    """
    places = jax.tree.map(lambda x: x.sharding, state)

    def call(state: Any, *rest: Any) -> Any:
        return step(fetched(state), *rest)

    return jax.jit(call, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, P())))


def offloaded(tree: Any) -> Any:
    """Arrays, or their shapes with shardings, in the memory of their devices' hosts; scalars stay where they are."""

    def moved(x: Any) -> Any:
        if not x.ndim:
            return x
        place = x.sharding.with_memory_kind(HOST)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        return jax.device_put(x, place)

    return jax.tree.map(moved, tree)


def fetched(tree: Any) -> Any:
    """Inside a compiled function: what `offloaded` put into host memory, on the device; the rest as it is."""

    def moved(x: Any) -> Any:
        there = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if there else x

    return jax.tree.map(moved, tree)


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, ordered for the hardware; axes it does not name have size 1.

    Raises:
      UserError: an axis is unknown, the axes do not multiply to the number of devices or do not match its slices, or
        a batch does not divide.
    """
    devices = list(devices or jax.devices())
    unknown = sorted(set(config.mesh) - set(AXES))
    if unknown:
        raise UserError(f"config.mesh.{unknown[0]} is no axis: use some of {', '.join(AXES)}")
    sizes = [int(config.mesh.get(axis, 1)) for axis in AXES]
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
    mesh = Mesh(_arranged(devices, sizes), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    check_batches(config, mesh)
    return mesh


def _arranged(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """Devices [slice, data, fsdp, tensor]: slices in order, and each one's devices along its own network.

    Raises:
      UserError: the devices are of another number of slices.
    """
    slices = sorted({getattr(device, "slice_index", 0) for device in devices})
    if len(slices) > 1 and sizes[0] != len(slices):
        raise UserError(
            f"config.mesh.slice = {sizes[0]}: these devices are {len(slices)} slices; set it to {len(slices)}"
        )
    # Stable: within a slice, or where the platform knows none (hosts of GPUs, virtual devices), the order is theirs.
    devices = sorted(devices, key=lambda device: getattr(device, "slice_index", 0))
    size = len(devices) // sizes[0]
    blocks = (devices[start : start + size] for start in range(0, len(devices), size))
    return np.stack(
        [mesh_utils.create_device_mesh(sizes[1:], block, allow_split_physical_axes=True) for block in blocks]
    )


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where a part of the batch leaves devices idle."""
    parts = max(config.rl.microbatches, config.rl.rollout_microbatches)
    images, group = config.data.batch_size // parts, config.rl.group_size
    taken = [axis for axes in batch_axes(mesh, images, group) for axis in axes]
    left = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1 and axis not in taken]
    if left:
        named, ways = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in left), math.prod(map(mesh.shape.get, left))
        raise UserError(
            f"config.data.batch_size / rl.microbatches = {images} images of {group} captions cannot be split over "
            f"config.mesh's {named}: make one of them a multiple of {ways}"
        )
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.eval.enabled and config.eval.batch_size % devices:
        raise UserError(
            f"config.eval.batch_size = {config.eval.batch_size} cannot be split over {' x '.join(BATCH_AXES)} = "
            f"{devices} devices: use a multiple of {devices}"
        )


def batch_axes(
    mesh: Mesh | AbstractMesh, b: int, g: int = 1, spare: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that split b, and those that split g: of slice, data and fsdp as many as divide, rather b than g.

    Args:
      spare: tensor may split g too, in what no model's tensor rules act on.
    """
    axes = [axis for axis in BATCH_AXES if mesh.shape[axis] > 1]

    def ways(some: Iterable[str]) -> int:
        return math.prod(mesh.shape[axis] for axis in some)

    best: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    for count in range(len(axes) + 1):
        for along_b in itertools.combinations(axes, count):
            along_g: tuple[str, ...] = ()
            for axis in axes:
                if axis not in along_b and g % ways((*along_g, axis)) == 0:
                    along_g = (*along_g, axis)
            found = (ways(along_b) * ways(along_g), ways(along_b))
            if b % ways(along_b) == 0 and found > (ways(best[0]) * ways(best[1]), ways(best[0])):
                best = (along_b, along_g)
    if spare and mesh.shape["tensor"] > 1 and g % ways((*best[1], "tensor")) == 0:
        best = (best[0], (*best[1], "tensor"))
    return best


def leading_axes(mesh: Mesh | AbstractMesh, batch: tuple[int, ...], spare: bool = True) -> tuple[tuple[str, ...], ...]:
    """The axes that split the last two of an activation's leading axes, b and g, or its only one, b."""
    if not batch:
        return ()
    return batch_axes(mesh, batch[-2], batch[-1], spare) if len(batch) > 1 else batch_axes(mesh, batch[0])[:1]


def under(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` traced with the mesh in context, so that a kernel can be chosen and split inside (`attention`)."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return call


def batch_kept(x: jax.Array, inner: int = 2, spare: bool = True) -> jax.Array:
    """An activation [..., t, d] kept split along its batch axes.

    Without it the partitioner may leave the weights where fsdp stores them, and work on the whole batch everywhere. The
    mesh is the one in context; without one nothing is done.

    Args:
      inner: number of axes behind the batch's, of which last ones of size 1 do not count.
      spare: see `batch_axes`; False in blocks whose weights tensor splits.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    batch = x.shape[: x.ndim - inner]
    while len(batch) > 1 and batch[-1] == 1:
        batch = batch[:-1]
    axes = leading_axes(mesh, batch, spare)
    spec = P(*[None] * (len(batch) - len(axes)), *axes, *[P.UNCONSTRAINED] * (x.ndim - len(batch)))
    return jax.lax.with_sharding_constraint(x, spec)


def platform() -> str:
    """tpu, gpu or cpu: of the mesh in context, which may be of machines that are not here; without one, cpu.

    Without a mesh nobody says how a kernel is to be split, which leaves what runs everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "cpu"
    found = mesh.abstract_device.platform
    return "gpu" if found in ("cuda", "rocm") else found


def group_ways(mesh: Mesh | None, b: int, g: int, spare: bool = False) -> int:
    """Into how many parts the mesh splits g."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in batch_axes(mesh, b, g, spare)[1])


def split_parts(tree: Any, parts: int, axis: int = 0) -> Any:
    """[..., n, ...] -> [parts, ..., n / parts, ...]; parts are strided, so that an axis that is split stays so."""

    def split(x: jax.Array) -> jax.Array:
        n = x.shape[axis]
        x = x.reshape(*x.shape[:axis], n // parts, parts, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, 0)

    return jax.tree.map(split, tree)


def join_parts(tree: Any, axis: int = 0) -> Any:
    """Inverse of `split_parts`."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, axis + 1)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(join, tree)


def in_parts(function: Callable[[Any], Any], tree: Any, parts: int, axis: int = 0) -> Any:
    """`function(tree)` with the memory of a part: for functions that treat the entries of an axis each for itself."""
    if parts == 1:
        return function(tree)
    return join_parts(jax.lax.map(function, split_parts(tree, parts, axis)), axis)


def each_sample(function: Callable[[jax.Array], jax.Array], x: jax.Array, mesh: Mesh | None, slices: bool) -> jax.Array:
    """`function(x)` of [b, g, ...] for weights that leave the tensor axis free: it splits g too, where it divides that.

    Args:
      function: treats every sample for itself.
      x: [b, g, ...].
      mesh: None splits nothing.
      slices: one sample of each group (a device) at a time.
    """
    spread = functools.partial(constrain_batch, mesh=mesh, group=True, spare=True)
    b, g = x.shape[:2]
    parts = g // group_ways(mesh, b, g, spare=True) if slices else 1
    return in_parts(lambda part: spread(function(spread(part))), spread(x), parts, axis=1)


def batch_sharding(mesh: Mesh, b: int) -> NamedSharding:
    """Of an array [b, ...]."""
    return NamedSharding(mesh, P(batch_axes(mesh, b)[0]))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch on the mesh; every process holds all of it and hands over what its devices need."""
    return {
        name: jax.make_array_from_callback(x.shape, batch_sharding(mesh, len(x)), x.__getitem__)
        for name, x in batch.items()
    }


def local_rows(size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch of `size` that lie on this process's devices, ascending: all it has to load."""
    parts = batch_sharding(mesh, size).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts if part is not None]))


def place_rows(batch: dict[str, np.ndarray], rows: np.ndarray, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch of `size` rows on the mesh, of which this process holds `rows` (`local_rows`) alone."""
    sharding = batch_sharding(mesh, size)

    def put(x: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            return x[np.searchsorted(rows, np.arange(size)[index[0] if index else slice(None)])]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return {name: put(x) for name, x in batch.items()}


def constrain_batch(tree: Any, mesh: Mesh | None, axis: int = 0, group: bool = False, spare: bool = False) -> Any:
    """Keeps the batch axes of activations split, whatever the weights' layout suggests to the partitioner.

    Args:
      tree: of arrays whose axis `axis` is b. Which device holds what along the axes behind is left open.
      group: the next axis is g, and may be split too.
      spare: see `batch_axes`.
    """
    if mesh is None:
        return tree

    def constrain(x: jax.Array) -> jax.Array:
        along_b, along_g = batch_axes(mesh, x.shape[axis], x.shape[axis + 1] if group else 1, spare)
        split = [along_b, along_g] if group else [along_b]
        rest = [P.UNCONSTRAINED] * (x.ndim - axis - len(split))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[None] * axis, *split, *rest)))

    return jax.tree.map(constrain, tree)


def decode_view(params: Any, mesh: Mesh | None, dtype: Any, rules: Rules) -> Any:
    """Weights as a loop wants them: in the compute type, gathered once, split by tensor alone.

    With fsdp-sharded weights and scanned layers the partitioner would gather every layer again for every token; a
    constraint on the weights before the loop moves the gathers out of it.
    """
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    if mesh is None:
        return params

    def view(path: Any, x: jax.Array) -> jax.Array:
        spec = P(*_used(_path(path), x.shape, mesh.shape, rules))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(view, params)
