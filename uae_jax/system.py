"""Puts a system together from a folder of weights: networks, prompts, towers, and the frozen parameters."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tokenizers import Tokenizer

from uae_jax import lora, optimizers, pixels, rewards, sharding
from uae_jax.convert import folder, pooled
from uae_jax.data.shapes import grammar
from uae_jax.errors import UserError
from uae_jax.models.cell_classifier.model import CellClassifier
from uae_jax.models.janus.model import Janus
from uae_jax.models.projector.model import Projector
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.vae import config as vae_config
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.printable import printable
from uae_jax.sampling import scheduler as schedulers
from uae_jax.sampling.tokens import Segment, content_lengths
from uae_jax.umm import Family, Params, autoregressive, caption, decoder, diffusion
from uae_jax.umm.prompts import Prompts

# The folder, in one of weights, that holds a model which both captions and draws.
JANUS = "janus"


class System(NamedTuple):
    """Everything but the weights in training."""

    modules: diffusion.Modules | Janus
    prompts: Prompts
    tokenizer: Tokenizer
    allowed: np.ndarray  # bool [v], tokens that a caption may hold
    towers: rewards.Towers
    judge: CellClassifier | None
    automaton: rewards.Automaton | None  # the data's grammar, where it has one
    frozen: Params  # on the mesh
    mesh: jax.sharding.Mesh
    rules: sharding.Rules  # where `frozen`, and what is trained, lie on it

    def family(self, config: Any, mesh: jax.sharding.Mesh | None = None, temperature: float | None = None) -> Family:
        """The family's functions; see `diffusion.build` and `autoregressive.build`."""
        family = (
            autoregressive.build(self.modules, self.prompts, self.allowed, config, mesh, temperature)
            if isinstance(self.modules, Janus)
            else diffusion.build(self.modules, self.prompts, self.allowed, config, mesh, temperature)
        )
        return Family(*(sharding.under(mesh, function) for function in family))

    def reward(self, config: Any, captions: Segment, similarities: dict[str, jax.Array]) -> jax.Array:
        """The reward [b, g] of captions and their redraws, as the step reckons it."""
        length = content_lengths(captions, self.prompts.end_token)
        of_text = rewards.of_text(config.reward, captions.actions, length, config.rl.token_budget, self.automaton)
        return rewards.weighted_sum(similarities | of_text, config.reward)


def weights_folder(config: Any) -> Path:
    """`config.weights`: a folder, or the name of one that ships with the package."""
    return folder.shipped(config.weights) if config.weights in folder.SHIPPED else Path(config.weights)


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of the folder of a model that captions. Raises UserError where there is none, or it is damaged."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{file} is missing: the captioner's folder must hold its tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library knows no other kind
        raise UserError(f"{file} cannot be read ({printable(error)[:200]}): copy it again") from None


def towers_folder(config: Any) -> Path:
    """Where the towers and the judge lie: `config.towers`, named as the weights are, by default beside these."""
    if not config.towers:
        return weights_folder(config)
    return folder.shipped(config.towers) if config.towers in folder.SHIPPED else Path(config.towers)


def captioner_folder(config: Any) -> Path:
    """The model that captions, which is what RL trains."""
    where = weights_folder(config)
    return where / (JANUS if (where / JANUS).is_dir() else "captioner")


# (folder, mesh, compute type) -> a model, as `folder.load_model`.
Read = Callable[[Path, Any, Any], folder.Model]


def load(config: Any, mesh: jax.sharding.Mesh, read: Read = folder.load_model) -> System:
    """Reads all models that `config` needs from its folder of weights and places them on the mesh.

    A folder with `janus/` in it is of the autoregressive family, any other of the diffusion family.

    Args:
      read: gives each model; a plan gives shapes instead of weights.

    Raises:
      UserError: a folder or a tensor is missing or does not fit, or a reward names no tower.
    """
    where, dtype = weights_folder(config), jnp.dtype(config.dtype)
    source = captioner_folder(config)
    # Frozen weights are read in the compute type only, so they are kept in it.
    captioner = read(source, mesh, dtype)
    tokenizer = load_tokenizer(source)
    frozen: Params = {}
    modules: diffusion.Modules | Janus
    if source.name == JANUS:
        # Not all of a Janus' special tokens are named in the config.json of its releases.
        captioner = captioner._replace(config=captioner.config.with_tokens(tokenizer.token_to_id))
        modules = Janus(captioner.config, dtype, config.remat)
    else:
        drawn_by, frozen = load_decoder(where, config, mesh, read)
        modules = diffusion.Modules(Qwen2_5_VL(captioner.config, dtype, config.remat), *drawn_by)
        if modules.projector.config.in_size != captioner.config.text.hidden_size:
            raise UserError(
                f"{where}: the projector reads states of {modules.projector.config.in_size} channels, but the "
                f"captioner's have {captioner.config.text.hidden_size}: they are not of one system"
            )
    frozen["start"] = captioner.params
    return complete(config, mesh, modules, captioner.config, tokenizer, frozen, read)


def complete(
    config: Any,
    mesh: jax.sharding.Mesh,
    modules: diffusion.Modules | Janus,
    sizes: Any,
    tokenizer: Tokenizer,
    frozen: Params,
    read: Read = folder.load_model,
) -> System:
    """A family's networks with the prompts, towers and judge that `config` names, read from `towers_folder`.

    Args:
      sizes: config of the model that captions.
      frozen: what the family needs; see its `build`.
      read: see `load`.

    Raises:
      UserError: see `load`.
    """
    towers, dtype = towers_folder(config), jnp.dtype(config.dtype)
    tower_models = {}
    for name in rewards.tower_names(config):
        if not (towers / name).is_dir():
            raise UserError(f"config.reward or config.monitor names {name!r}, but {towers / name} does not exist")
        tower_models[name] = read(towers / name, mesh, dtype)
    placed = {"start": sizes, "encoder": sizes}
    placed |= {f"towers/{name}": model.config for name, model in tower_models.items()}
    frozen = frozen | {"towers": {name: model.params for name, model in tower_models.items()}}
    judge, automaton = None, None
    if config.data.source == "shapes":
        model = read(towers / "judge", mesh, np.float32)
        judge, frozen["judge"] = CellClassifier(model.config), model.params
        placed["judge"] = model.config
        automaton = rewards.Automaton(*grammar.automaton(tokenizer))
    return System(
        modules=modules,
        prompts=Prompts.build(tokenizer, config, sizes),
        tokenizer=tokenizer,
        allowed=caption.allowed_tokens(tokenizer, sizes.text.vocab_size, sizes.eos_token_id),
        towers={n: rewards.tower(m.config, dtype, pixels.load(towers / n, m.config)) for n, m in tower_models.items()},
        judge=judge,
        automaton=automaton,
        frozen=frozen,
        mesh=mesh,
        rules=(
            *folder.rules(placed, mesh),
            *(() if isinstance(modules, Janus) else decoder_rules(modules, mesh)),
            *optimizers.RULES,
        ),
    )


class Decoder(NamedTuple):
    """The modules of `diffusion.Modules` that draw."""

    projector: Projector
    transformer: decoder.Transformer
    vae: AutoencoderKL | None
    scheduler: schedulers.Scheduler | None


def load_decoder(
    where: Path, config: Any, mesh: jax.sharding.Mesh, read: Read = folder.load_model
) -> tuple[Decoder, Params]:
    """Projector, transformer and, where their folders exist, vae and scheduler of a folder of weights.

    Returns:
      The modules; and their parameters on the mesh, with `pooled`.

    Raises:
      UserError: see `load`; or a part is of another kind than is wanted, or does not fit the others.
    """
    dtype = jnp.dtype(config.dtype)
    declared = config.get("models", {}).get("transformer")
    kinds: tuple[str, ...] = (folder.architecture(declared.to_dict()),) if declared else decoder.KINDS
    parts: dict[str, folder.Model] = {}
    for name, allowed in (("projector", ("Projector",)), ("transformer", kinds), ("vae", (vae_config.CLASS_NAME,))):
        if name == "vae" and not (where / name).is_dir():
            continue
        kind = folder.architecture(folder.load_config(where / name))
        if kind not in allowed:
            wanted = " or ".join(allowed)
            wanted = (
                f"config.models.{name} says {wanted}"
                if declared and name == "transformer"
                else f"{wanted} is wanted there"
            )
            raise UserError(f"{where / name} holds a {kind or 'nameless model'}, but {wanted}")
        parts[name] = read(where / name, mesh, dtype)
    model = decoder.transformer(parts["transformer"].config, dtype, config.remat)
    vae = AutoencoderKL(parts["vae"].config, dtype) if "vae" in parts else None
    projector = Projector(parts["projector"].config, dtype)
    width = model.config.joint_attention_dim
    if projector.config.out_size != width:
        raise UserError(
            f"{where}: the projector gives {projector.config.out_size} channels, but the transformer reads {width}"
        )
    latents, drawn = (3 if vae is None else vae.config.latent_channels), decoder.channels(model)
    if latents != drawn:
        has = f"{where / 'vae'} is missing" if vae is None else f"the vae's latents have {latents} channels"
        raise UserError(f"{where}: {has}, but the transformer draws {drawn} channels")
    frozen: Params = {name: part.params for name, part in parts.items()}
    vector = load_pooled(where, model, vae)  # made, not placed: a plan's devices take no arrays
    frozen |= sharding.made(lambda: {"pooled": jnp.asarray(vector)}, mesh=mesh, rules=POOLED)
    found = schedulers.load(where / "scheduler") if (where / "scheduler").is_dir() else None
    return Decoder(projector, model, vae, found), frozen


def offloaded(frozen: Params) -> Params:
    """Frozen weights in host memory, but for the captioner's, which every phase of a step reads, and the judge's."""
    return frozen | {x: sharding.offloaded(frozen[x]) for x in (*diffusion.DRAWING, "towers") if x in frozen}


# The pooled condition is one vector.
POOLED: sharding.Rules = (("pooled", sharding.Split.COPIED),)


def decoder_rules(drawn_by: Decoder | diffusion.Modules, mesh: jax.sharding.Mesh) -> sharding.Rules:
    """Sharding rules of the parameters that `load_decoder` gives."""
    modules = {"projector": drawn_by.projector, "transformer": drawn_by.transformer, "vae": drawn_by.vae}
    return (*folder.rules({name: m.config for name, m in modules.items() if m is not None}, mesh), *POOLED)


def load_pooled(where: Path, model: decoder.Transformer, vae: AutoencoderKL | None) -> np.ndarray:
    """The constant pooled condition, float32 [pooled_projection_dim], of transformer/pooled.safetensors.

    Zeros in a world whose latents are pixels, where there is no text tower.

    Raises:
      UserError: there is no such file, or it does not fit the transformer.
    """
    path, size = where / "transformer" / pooled.FILE, model.config.pooled_projection_dim
    if vae is None and not path.exists():
        return np.zeros(size, np.float32)
    return pooled.read(path, size)


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
