"""A run of stage `rl` without its weights: the modules of a config, and the shapes and layouts of all that it holds.

Sizes come from `config.models.NAME` (fields of that model's config.json; `scheduler` those of scheduler_config.json),
else from the folders `config.weights` and `config.towers`, of which only the small files are read. A captioner without
tokenizer.json gets a stand-in that takes words and signs for tokens: prompts then have about as many as they would.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import models, pre_tokenizers

from uae_jax import rewards, sharding, system
from uae_jax.convert import folder, pooled
from uae_jax.convert.table import param_shape
from uae_jax.data.shapes import tokenizer as shapes_tokenizer
from uae_jax.errors import UserError
from uae_jax.models.janus.config import TOKENS
from uae_jax.sampling import scheduler
from uae_jax.stages import rl
from uae_jax.step import State
from uae_jax.umm import Family

# The tokens that a captioner's prompts must hold, by its class: as they are written, and their ids or where
# config.json says them.
MARKS: dict[str, dict[str, str | int]] = {
    "Qwen2_5_VLForConditionalGeneration": {"<|image_pad|>": "image_token_id"},
    "JanusForConditionalGeneration": dict(TOKENS.values()),
}


class Abstract(NamedTuple):
    """What a step is compiled from. Arrays are `jax.ShapeDtypeStruct`s with their layout on the mesh."""

    config: Any
    mesh: Mesh
    system: system.System  # whose `frozen` is empty
    family: Family
    optimizer: optax.GradientTransformation
    state: State
    frozen: Any
    stand_in: bool  # prompts were counted by a stand-in tokenizer
    on_chip: bool = False  # what the config puts into host memory could not be put there


def build(config: Any, mesh: Mesh) -> Abstract:
    """Puts the run of a valid config together.

    Raises:
      UserError: another stage than `rl`, a model whose sizes nothing says, or models that do not fit each other.
    """
    if config.stage != "rl":
        raise UserError(f"config.stage = {config.stage!r} cannot be planned: use --config.stage=rl")
    kept: list[Any] = []

    def start(where: str) -> tuple[State, Any]:
        planned = config.copy_and_resolve_references()
        planned.weights, planned.towers = where, ""
        built = system.load(planned, mesh, _shapes)
        state, optimizer = rl.start(planned, built)
        frozen = built.frozen
        kept.extend((built._replace(frozen={}), optimizer, planned))
        return state, frozen

    with tempfile.TemporaryDirectory() as where:
        stand_in = _write_folder(config, Path(where))
        state, frozen = jax.eval_shape(lambda: start(where))
    built, optimizer, planned = kept
    run = Abstract(planned, mesh, built, built.family(planned, mesh), optimizer, state, frozen, stand_in)
    state, frozen = placed(state, run), placed(frozen, run)
    if config.offload_optimizer:
        state = state.replace(opt_state=sharding.offloaded(state.opt_state))
    if config.offload_frozen:
        frozen = system.offloaded(frozen)
    wanted = config.offload_optimizer or config.offload_frozen
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((state.opt_state, frozen))}
    return run._replace(state=state, frozen=frozen, on_chip=wanted and sharding.HOST not in kinds)


def placed(tree: Any, run: Abstract) -> Any:
    """Parameters, or what is shaped like them, where a run puts them."""
    layout = sharding.param_shardings(tree, run.mesh, run.system.rules)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout)


def share_used(params: Any, run: Abstract) -> float:
    """The part of a captioner's language model that a chip uses: of what tensor splits its part, of the rest all."""
    flat = traverse_util.flatten_dict({"start": {"language": params["language"]}}, sep="/")

    def part(path: str, x: Any) -> float:
        split = sharding.split_of(path, run.system.rules) in (sharding.Split.COLUMNS, sharding.Split.ROWS)
        return x.size / (run.mesh.shape["tensor"] if split and x.size >= sharding.SMALLEST_SHARDED else 1)

    return sum(part(path, x) for path, x in flat.items()) / sum(x.size for x in flat.values())


def batched(tree: Any, mesh: Mesh, group: bool = False, spare: bool = False) -> Any:
    """Arrays [b, ...], or [b, g, ...] with `group`, where a run puts them (`sharding.constrain_batch`)."""

    def of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        b, g = x.shape[0], x.shape[1] if group else 1
        axes = sharding.batch_axes(mesh, b, g, group and spare)[: 1 + group]
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*axes)))

    return jax.tree.map(of, tree)


def bytes_per_chip(tree: Any) -> float:
    """Bytes of an abstract tree in the memory of one chip."""

    def of(x: jax.ShapeDtypeStruct) -> float:
        if x.sharding is not None and x.sharding.memory_kind == sharding.HOST:
            return 0.0
        shape = x.sharding.shard_shape(x.shape) if isinstance(x.sharding, NamedSharding) else x.shape
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return float(np.prod(shape)) * (8 if key else np.dtype(x.dtype).itemsize)

    return sum(map(of, jax.tree.leaves(tree)))


def _shapes(where: Path, mesh: Mesh, dtype: Any) -> folder.Model:
    """A model whose parameters are zeros; under `eval_shape` they take no memory."""
    raw = folder.load_config(where)
    known = _known(raw, str(where.name))
    config = known.config.from_hf(raw)
    flat = {entry.path: jnp.zeros(param_shape(entry), dtype) for entry in known.table(config)}
    return folder.Model(config, traverse_util.unflatten_dict(flat, sep="/"))


def _known(raw: dict[str, Any], name: str) -> folder.Architecture:
    kind = folder.architecture(raw)
    if kind not in folder.ARCHITECTURES:
        raise UserError(
            f"config.models.{name}: architecture {kind!r} is not one of {', '.join(sorted(folder.ARCHITECTURES))}"
        )
    return folder.ARCHITECTURES[kind]


def _write_folder(config: Any, target: Path) -> bool:
    """A folder of weights without weights, as `system.load` reads it; True if a tokenizer had to be made up."""
    weights, beside = system.weights_folder(config), system.towers_folder(config)
    given, towers = config.get("models", {}), {*rewards.tower_names(config), "judge"}
    found = {path.name: path for path in weights.iterdir() if path.is_dir()} if weights.is_dir() else {}
    found |= {name: beside / name for name in towers if (beside / name).is_dir()}
    for name in sorted({*found, *given}):
        part = target / name
        part.mkdir()
        for path in found[name].iterdir() if name in found else ():
            if path.is_file() and path.suffix != ".safetensors":
                (part / path.name).symlink_to(path.resolve())
        if name in given:
            written = part / (scheduler.FILE if name == "scheduler" else "config.json")
            written.unlink(missing_ok=True)
            written.write_text(json.dumps(given[name].to_dict()))
    captioner = target / (system.JANUS if (target / system.JANUS).is_dir() else "captioner")
    if not (captioner / "config.json").is_file():
        raise UserError(
            f"no sizes to plan with: neither config.models.captioner nor {weights / 'captioner'} is there; set "
            "config.models (as configs/tiny_coldstart.py does) or name a folder by --config.weights"
        )
    parts = [] if captioner.name == system.JANUS else ["projector", "transformer"]
    for name in (*parts, *rewards.tower_names(config)):
        if not (target / name / "config.json").is_file():
            raise UserError(f"no sizes of the {name}: set config.models.{name}, or name a folder by --config.weights")
    size = folder.load_config(target / "transformer").get("pooled_projection_dim") if parts else 0
    if size:
        pooled.write(target / "transformer" / pooled.FILE, np.zeros(size, np.float32))
    tokenizer = captioner / "tokenizer.json"
    if tokenizer.exists():
        return False
    shapes = config.data.source == "shapes"
    made = shapes_tokenizer.build() if shapes else _stand_in(folder.load_config(captioner))
    made.save(str(tokenizer))
    return not shapes


def _stand_in(raw: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer that counts words, signs and markup of a prompt, and knows the marks of images."""
    marks = MARKS.get(folder.architecture(raw))
    if marks is None:
        raise UserError("config.weights has no tokenizer.json, and no stand-in is known for this captioner")
    ids = {mark: raw[at] if isinstance(at, str) else at for mark, at in marks.items()}
    made = tokenizers.Tokenizer(models.WordLevel({"<|unk|>": 0, **ids}, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"<\|?\w+\|?>| ?\w+|[^\w\s]|\s+"), "isolated")
    made.add_special_tokens(list(ids))
    return made
