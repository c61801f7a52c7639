"""Model folders as Hugging Face lays them out: config.json beside safetensors, never pickle."""

import importlib.resources
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from uae_jax.convert import table as tables
from uae_jax.errors import UserError
from uae_jax.models.cell_classifier import model as cell_classifier
from uae_jax.models.clip import config as clip_config
from uae_jax.models.clip import weights as clip_weights
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.projector import model as projector
from uae_jax.models.qwen2_5_vl import config as qwen_config
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.t5 import config as t5_config
from uae_jax.models.t5 import weights as t5_weights
from uae_jax.models.vae import config as vae_config
from uae_jax.models.vae import weights as vae_weights

WEIGHTS = "model.safetensors"
# config.json's architecture -> its config class and its name table.
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "Qwen2_5_VLForConditionalGeneration": (qwen_config.Config, qwen_weights.table),
    "SD3Transformer2DModel": (sd3_config.Config, sd3_weights.table),
    "FluxTransformer2DModel": (flux_config.Config, flux_weights.table),
    "AutoencoderKL": (vae_config.Config, vae_weights.table),
    "CLIPModel": (clip_config.Config, clip_weights.table),
    "CLIPTextModel": (clip_config.TextModelConfig, clip_weights.text_table),
    "CLIPTextModelWithProjection": (clip_config.TextModelConfig, clip_weights.text_table),
    "T5EncoderModel": (t5_config.Config, t5_weights.table),
    "Projector": (projector.Config, projector.table),
    "CellClassifier": (cell_classifier.Config, cell_classifier.table),
}


class Model(NamedTuple):
    """An architecture's config and its parameters (host arrays, float32)."""

    config: Any
    params: tables.Params


def architecture(config: dict[str, Any]) -> str:
    """The class that a config.json names, in transformers' or diffusers' way."""
    return config.get("_class_name") or (config.get("architectures") or [""])[0]


def shipped(name: str) -> Path:
    """The folder of weights that comes with the package."""
    return Path(str(importlib.resources.files("uae_jax"))) / "weights" / name


def load_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json: name a folder of converted or downloaded weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}/config.json is not JSON ({error}): copy it again") from None


def load_model(folder: Path) -> Model:
    """Config and parameters of one model folder.

    Raises:
      UserError: a file is missing or damaged, the architecture is unknown, or tensors and model do not match.
    """
    raw = load_config(folder)
    kind = architecture(raw)
    if kind not in ARCHITECTURES:
        raise UserError(f"{folder}/config.json: architecture {kind!r} is not one of {', '.join(sorted(ARCHITECTURES))}")
    config_class, table = ARCHITECTURES[kind]
    config = config_class.from_hf(raw)
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    return Model(config, tables.load(table(config), tensors, str(path)))


def save_model(folder: Path, config: Any, params: tables.Params, dtype: Any = np.float32) -> None:
    """Writes config.json and one safetensors file, in the layout that `load_model` and Hugging Face read."""
    raw = config.to_hf()
    _, table = ARCHITECTURES[architecture(raw)]
    tensors = tables.save(table(config), params)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: x.astype(dtype) for name, x in tensors.items()}, metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(data)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def count(params: tables.Params) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in traverse_util.flatten_dict(params).values())
