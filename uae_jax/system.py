"""Puts a system together from a folder of weights: networks, prompts, towers, and the frozen parameters."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tokenizers import Tokenizer

from uae_jax import lora, rewards, sharding
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.errors import UserError
from uae_jax.models.cell_classifier.model import CellClassifier
from uae_jax.models.projector.model import Projector
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.sd3.model import SD3Transformer
from uae_jax.umm import Family, Params, caption, diffusion


class System(NamedTuple):
    """Everything but the weights in training."""

    modules: diffusion.Modules
    prompts: diffusion.Prompts
    tokenizer: Tokenizer
    allowed: np.ndarray  # bool [v], tokens that a caption may hold
    towers: rewards.Towers
    judge: CellClassifier | None
    automaton: rewards.Automaton | None  # the data's grammar, where it has one
    frozen: Params  # on the mesh

    def family(self, config: Any, mesh: jax.sharding.Mesh | None = None, temperature: float | None = None) -> Family:
        """The family's functions; see `diffusion.build`."""
        return diffusion.build(self.modules, self.prompts, self.allowed, config, mesh, temperature)


def weights_folder(config: Any) -> Path:
    """`config.weights`, or the tiny world that ships with the package."""
    return Path(config.weights) if config.weights else folder.shipped("tiny")


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of a captioner's folder."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: the captioner's folder must hold its tokenizer")
    return Tokenizer.from_file(str(file))


def load(config: Any, mesh: jax.sharding.Mesh) -> System:
    """Reads all models that `config` needs from its folder of weights and places them on the mesh.

    Raises:
      UserError: a folder or a tensor is missing or does not fit, or a reward names no tower.
    """
    where = weights_folder(config)
    dtype = jnp.dtype(config.dtype)
    # Frozen weights are read in the compute type only, so they are kept in it.
    captioner, projector, transformer = (
        folder.load_model(where / name, mesh, dtype) for name in ("captioner", "projector", "transformer")
    )
    tokenizer = load_tokenizer(where / "captioner")
    modules = diffusion.Modules(
        Qwen2_5_VL(captioner.config, dtype, config.remat),
        Projector(projector.config, dtype),
        SD3Transformer(transformer.config, dtype, config.remat),
    )
    tower_models = {}
    for name in rewards.tower_names(config):
        if not (where / name).is_dir():
            raise UserError(f"config.reward or config.monitor names {name!r}, but {where / name} does not exist")
        tower_models[name] = folder.load_model(where / name, mesh, dtype)
    frozen = {
        "start": captioner.params,
        "projector": projector.params,
        "transformer": transformer.params,
        "towers": {name: model.params for name, model in tower_models.items()},
    }
    frozen["pooled"] = sharding.place(np.zeros(transformer.config.pooled_projection_dim, np.float32), mesh)
    judge, automaton = None, None
    if config.data.source == "shapes":
        model = folder.load_model(where / "judge", mesh)
        judge, frozen["judge"] = CellClassifier(model.config), model.params
        automaton = rewards.Automaton(*grammar.automaton(tokenizer))
    return System(
        modules=modules,
        prompts=diffusion.Prompts.build(tokenizer, config, captioner.config),
        tokenizer=tokenizer,
        allowed=caption.allowed_tokens(tokenizer, captioner.config.text.vocab_size, captioner.config.eos_token_id),
        towers={n: rewards.tower(m.config, dtype) for n, m in tower_models.items()},
        judge=judge,
        automaton=automaton,
        frozen=frozen,
    )


def trained(start: Params, config: Any) -> Params:
    """What training changes of the captioner: fresh adapters (`config.lora.rank`), or copies of `config.trainable`.

    Raises:
      UserError: a regex matches nothing.
    """
    if not config.lora.rank:
        return trainable(start, config.trainable)
    return lora.initial(start, config.lora.rank, config.lora.target, jax.random.key(config.seed))


def trainable(params: Params, pattern: str) -> Params:
    """The part of a tree whose '/'-joined paths match `pattern` from the start, in float32.

    Raises:
      UserError: nothing matches.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    # Copies: what is trained is donated to the step, what it started from stays.
    chosen = {path: jnp.array(x, jnp.float32) for path, x in flat.items() if re.match(pattern, path)}
    if not chosen:
        raise UserError(f"config.trainable = {pattern!r} matches no parameter; paths look like {sorted(flat)[0]}")
    return traverse_util.unflatten_dict(chosen, sep="/")
