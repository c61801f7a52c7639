"""A run of stage `rl` without its weights: the modules of a config, and the shapes and layouts of all that it holds.

Sizes come from `config.models.NAME` (fields of that model's config.json; `scheduler` those of scheduler_config.json),
else from the folder `config.weights`, of which only the small files are read. A captioner without tokenizer.json gets
a stand-in that takes words and signs for tokens: prompts then have about as many as they would.
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
from tokenizers import models, pre_tokenizers

from uae_jax import sharding, system
from uae_jax.convert import folder, pooled
from uae_jax.convert.table import param_shape
from uae_jax.data.shapes import tokenizer as shapes_tokenizer
from uae_jax.errors import UserError
from uae_jax.sampling import scheduler
from uae_jax.stages import rl
from uae_jax.step import State
from uae_jax.umm import Family

# How the image stands in a captioner's prompts, by its class; the id is config.json's `image_token_id`.
IMAGE_MARKS = {"Qwen2_5_VLForConditionalGeneration": "<|image_pad|>"}


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
        planned.weights = where
        built = system.load(planned, mesh, _shapes)
        state, optimizer = rl.start(planned, built)
        frozen = built.frozen
        kept.extend((built._replace(frozen={}), optimizer, planned))
        return state, frozen

    with tempfile.TemporaryDirectory() as where:
        stand_in = _write_folder(config, Path(where))
        state, frozen = jax.eval_shape(lambda: start(where))
    built, optimizer, planned = kept
    family = built.family(planned, mesh)
    return Abstract(planned, mesh, built, family, optimizer, placed(state, mesh), placed(frozen, mesh), stand_in)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Parameters, or what is shaped like them, where a run puts them."""
    layout = sharding.param_shardings(tree, mesh)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, layout)


def batched(tree: Any, mesh: Mesh) -> Any:
    """Arrays with a batch axis first, where a run puts them."""
    where = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def bytes_per_chip(tree: Any) -> float:
    """Bytes of an abstract tree on one chip."""

    def of(x: jax.ShapeDtypeStruct) -> float:
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
    source = system.weights_folder(config)
    given = config.get("models", {})
    parts = {path.name for path in source.iterdir() if path.is_dir()} if source.is_dir() else set()
    for name in sorted(parts | set(given)):
        part = target / name
        part.mkdir()
        for path in (source / name).iterdir() if name in parts else ():
            if path.is_file() and path.suffix != ".safetensors":
                (part / path.name).symlink_to(path.resolve())
        if name in given:
            written = part / (scheduler.FILE if name == "scheduler" else "config.json")
            written.unlink(missing_ok=True)
            written.write_text(json.dumps(given[name].to_dict()))
    if not (target / "captioner" / "config.json").is_file():
        raise UserError(
            f"no sizes to plan with: neither config.models.captioner nor {source / 'captioner'} is there; set "
            "config.models (as configs/tiny_coldstart.py does) or name a folder by --config.weights"
        )
    for name in ("projector", "transformer"):
        if not (target / name / "config.json").is_file():
            raise UserError(f"no sizes of the {name}: set config.models.{name}, or name a folder by --config.weights")
    size = folder.load_config(target / "transformer").get("pooled_projection_dim")
    if size:
        pooled.write(target / "transformer" / pooled.FILE, np.zeros(size, np.float32))
    tokenizer = target / "captioner" / "tokenizer.json"
    if tokenizer.exists():
        return False
    shapes = config.data.source == "shapes"
    made = shapes_tokenizer.build() if shapes else _stand_in(folder.load_config(target / "captioner"))
    made.save(str(tokenizer))
    return not shapes


def _stand_in(raw: dict[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer that counts words, signs and markup of a prompt, and knows the mark of the image."""
    mark = IMAGE_MARKS.get(folder.architecture(raw))
    if mark is None or "image_token_id" not in raw:
        raise UserError("config.weights has no captioner/tokenizer.json, and no stand-in is known for this captioner")
    made = tokenizers.Tokenizer(models.WordLevel({"<|unk|>": 0, mark: raw["image_token_id"]}, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"<\|?\w+\|?>| ?\w+|[^\w\s]|\s+"), "isolated")
    made.add_special_tokens([mark])
    return made
