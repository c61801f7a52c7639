"""Model folders as Hugging Face lays them out: config.json beside safetensors, never pickle."""

import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors.numpy import save

from uae_jax.convert import files, memory
from uae_jax.convert import table as tables
from uae_jax.errors import UserError
from uae_jax.models.cell_classifier import model as cell_classifier
from uae_jax.models.clip import config as clip_config
from uae_jax.models.clip import weights as clip_weights
from uae_jax.models.dinov2 import config as dinov2_config
from uae_jax.models.dinov2 import weights as dinov2_weights
from uae_jax.models.dinov3 import config as dinov3_config
from uae_jax.models.dinov3 import weights as dinov3_weights
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.janus import config as janus_config
from uae_jax.models.janus import original as janus_original
from uae_jax.models.janus import vq, vq_weights
from uae_jax.models.janus import weights as janus_weights
from uae_jax.models.projector import model as projector
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.siglip import config as siglip_config
from uae_jax.models.siglip import weights as siglip_weights
from uae_jax.models.t5 import config as t5_config
from uae_jax.models.t5 import weights as t5_weights
from uae_jax.models.vae import config as vae_config
from uae_jax.models.vae import weights as vae_weights
from uae_jax.sharding import Rules, below

# Names that `config.weights` may have instead of a path: the tiny worlds.
SHIPPED = ("", "tiny", "tiny_ar")


class Architecture(NamedTuple):
    """How a class of config.json is read."""

    config: Any  # from_hf, to_hf
    table: Callable[[Any], list[tables.Entry]]
    rules: Callable[[Any, int], Rules]  # (config, size of the mesh's tensor axis) -> where its parameters go
    canonical: Callable[[str], str] = lambda name: name  # a tensor's name in the table, where releases differ
    ties: Callable[[Any], Mapping[str, str]] = lambda config: {}  # copies that a file may hold of other tensors
    unused: Callable[[str], bool] = lambda name: False  # tensors that a file may hold and the model does not read
    module_name: Callable[[str], str] = lambda name: name  # of a tensor in transformers' class, where files differ
    buffers: tuple[str, ...] = ()  # no weights, in files of early releases: left out


# by the class that config.json names
ARCHITECTURES: dict[str, Architecture] = {
    "Qwen2_5_VLForConditionalGeneration": Architecture(
        qwen_config.Config,
        qwen_weights.table,
        qwen_weights.rules,
        qwen_weights.canonical,
        qwen_weights.ties,
        module_name=qwen_weights.module_name,
    ),
    "JanusForConditionalGeneration": Architecture(
        janus_config.Config, janus_weights.table, janus_weights.rules, ties=janus_weights.ties
    ),
    "MultiModalityCausalLM": Architecture(
        janus_original,
        janus_original.table,
        janus_weights.rules,
        ties=janus_original.ties,
        unused=janus_original.unused,
    ),
    "SD3Transformer2DModel": Architecture(sd3_config.Config, sd3_weights.table, sd3_weights.rules),
    "FluxTransformer2DModel": Architecture(flux_config.Config, flux_weights.table, flux_weights.rules),
    "AutoencoderKL": Architecture(vae_config.Config, vae_weights.table, vae_weights.rules),
    "JanusVQVAE": Architecture(vq.VQConfig, vq_weights.table, vq_weights.rules),
    "CLIPModel": Architecture(clip_config.Config, clip_weights.table, clip_weights.rules, buffers=clip_weights.BUFFERS),
    "CLIPTextModel": Architecture(
        clip_config.TextModelConfig,
        clip_weights.text_table,
        clip_weights.text_rules,
        clip_weights.canonical_text,
        buffers=clip_weights.BUFFERS,
    ),
    "CLIPTextModelWithProjection": Architecture(
        clip_config.TextModelConfig, clip_weights.text_table, clip_weights.text_rules, buffers=clip_weights.BUFFERS
    ),
    "Dinov2Model": Architecture(dinov2_config.Config, dinov2_weights.table, dinov2_weights.rules),
    "Dinov2WithRegistersModel": Architecture(dinov2_config.Config, dinov2_weights.table, dinov2_weights.rules),
    "DINOv3ViTModel": Architecture(
        dinov3_config.Config, dinov3_weights.table, dinov3_weights.rules, dinov3_weights.canonical
    ),
    "SiglipModel": Architecture(
        siglip_config.Config, siglip_weights.table, siglip_weights.rules, buffers=clip_weights.BUFFERS
    ),
    "SiglipVisionModel": Architecture(
        siglip_config.Config,
        siglip_weights.table,
        siglip_weights.rules,
        siglip_weights.canonical_vision,
        buffers=clip_weights.BUFFERS,
    ),
    "T5EncoderModel": Architecture(t5_config.Config, t5_weights.table, t5_weights.rules, ties=t5_weights.ties),
    "Projector": Architecture(projector.Config, projector.table, projector.rules),
    "CellClassifier": Architecture(cell_classifier.Config, cell_classifier.table, cell_classifier.rules),
}


# by the model_type of a config.json that names no class
_BY_TYPE = {janus_original.MODEL_TYPE: "MultiModalityCausalLM"}


class Model(NamedTuple):
    """An architecture's config and its parameters."""

    config: Any
    params: tables.Params


class Checkpoint(NamedTuple):
    """A model folder whose tensors are known to fit, and have not been read yet."""

    folder: Path
    architecture: str
    config: Any
    table: list[tables.Entry]
    tensors: dict[str, np.ndarray]  # views of the files, under the table's names
    written: dict[str, list[str]]  # the names in the files of each, more than one where it is tied
    stem: str  # of the files' names
    unused: dict[str, np.ndarray]  # views of tensors that no parameter is made of


def architecture(config: dict[str, Any]) -> str:
    """The class that a config.json names, in transformers' or diffusers' way."""
    named = config.get("_class_name") or (config.get("architectures") or [""])[0]
    return named or _BY_TYPE.get(config.get("model_type", ""), "")


def rules_of(config: Any, mesh: Mesh | None) -> Rules:
    """Sharding rules of the model that a config belongs to; none without a mesh."""
    return () if mesh is None else ARCHITECTURES[architecture(config.to_hf())].rules(config, mesh.shape["tensor"])


def rules(configs: Mapping[str, Any], mesh: Mesh) -> Rules:
    """Sharding rules of a tree that holds models, or what is trained of them, below these names: {name: config}."""
    return tuple(rule for name, config in configs.items() for rule in below(name, rules_of(config, mesh)))


def shipped(name: str) -> Path:
    """A folder of weights that comes with the package, one of `SHIPPED`; "" is `tiny`."""
    return Path(str(importlib.resources.files("uae_jax"))) / "weights" / (name or "tiny")


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
      UserError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no config.json: name a folder of converted or downloaded weights") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object: copy it again")
    return values


def open_model(folder: Path) -> Checkpoint:
    """Checks a model folder by its config and the headers of its files.

    Raises:
      UserError: a file is missing or damaged, the architecture is unknown, or tensors and model do not match (which
        lists all that are missing, unexpected, there twice, or of a wrong shape or type).
    """
    raw = load_config(folder)
    kind = architecture(raw)
    if kind not in ARCHITECTURES:
        raise UserError(f"{folder}/config.json: architecture {kind!r} is not one of {', '.join(sorted(ARCHITECTURES))}")
    known = ARCHITECTURES[kind]
    try:
        config = known.config.from_hf(raw)
        table = known.table(config)
    except UserError as error:
        raise UserError(f"{folder}/{error}" if str(error).startswith("config.json") else f"{folder}: {error}") from None
    stem, headers, problems = files.read_headers(folder)
    headers = {name: header for name, header in headers.items() if name not in known.buffers}
    problems += [
        f"type of {name}: expected one of {', '.join(files.DTYPES)}, found {header.dtype}"
        for name, header in headers.items()
        if header.dtype not in files.DTYPES
    ]
    ties = {name: target for name, target in known.ties(config).items() if name in headers}
    names: dict[str, str] = {}
    unused = [name for name in headers if known.unused(name)]
    for name in [name for name in headers if name not in ties and name not in unused]:
        other = names.setdefault(known.canonical(name), name)
        if other != name:
            problems.append(f"twice: {known.canonical(name)}, as {other} and {name}")
    problems += tables.mismatches(table, {canonical: headers[name].shape for canonical, name in names.items()})
    tables.refuse(problems, str(folder))
    views = files.map_tensors(headers)
    tensors = {canonical: views[name] for canonical, name in names.items()}
    written = {canonical: [name] for canonical, name in names.items()}
    for name, target in ties.items():
        if not _equal(views[name], tensors[target]):
            raise UserError(f"{folder}: config.json ties {name} to {names[target]}, but they differ: untie them there")
        written[target].append(name)
    return Checkpoint(folder, kind, config, table, tensors, written, stem, {name: views[name] for name in unused})


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    """To the bit; row by row, as they may be large."""
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(x, y, strict=True))


def load_model(folder: Path, mesh: Mesh | None = None, dtype: Any = np.float32) -> Model:
    """Config and parameters of one model folder, in `dtype`.

    With a mesh every parameter goes straight to its place there (the architecture's `rules`); otherwise they are arrays
    on the host.

    Raises:
      UserError: see `open_model`; or there is too little memory for the parameters.
    """
    found = open_model(folder)
    sharded = rules_of(found.config, mesh)
    memory.check(str(folder), found.table, dtype, mesh, sharded)
    if mesh is None:
        return Model(found.config, tables.load(found.table, found.tensors, str(folder), dtype))
    return Model(found.config, tables.place(found.table, found.tensors, mesh, sharded, dtype))


def save_model(folder: Path, config: Any, params: tables.Params, dtype: Any = np.float32) -> None:
    """Writes config.json and one safetensors file, in the layout that `load_model`, transformers and diffusers read."""
    raw = config.to_hf()
    tensors = tables.save(ARCHITECTURES[architecture(raw)].table(config), params)
    folder.mkdir(parents=True, exist_ok=True)
    transformers_stem, diffusers_stem = files.STEMS
    stem = diffusers_stem if "_class_name" in raw else transformers_stem
    data = save({name: x.astype(dtype) for name, x in tensors.items()}, metadata={"format": "pt"})
    (folder / f"{stem}.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def count(params: tables.Params) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in traverse_util.flatten_dict(params).values())
