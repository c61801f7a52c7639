"""Stage `decoder` on pictures with captions: projector and MM-DiT of a folder of weights learn to draw long captions.

The paper's first stage: conditional flow matching in the VAE's latents, noise levels logit-normal and then shifted
(SD3, arXiv 2403.03206), the captioner frozen, a share of captions dropped so that guidance has an unconditional branch.
`config.decoder.trainable` says which part learns: first the projector alone, then, from the weights that run wrote,
projector and transformer; `config.decoder.lora` adds adapters, whose products are merged into what is written.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from uae_jax import lora, optimizers, sharding, system
from uae_jax.convert import folder, transfer
from uae_jax.data import latents, pairs
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.sampling import flow
from uae_jax.stages import Program, coldstart
from uae_jax.step import Metrics, State
from uae_jax.umm import Params, decoder, diffusion
from uae_jax.umm.prompts import Prompts, captions_as_text, merge

PARTS = ("projector", "transformer")


def build(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program; `finish` writes workdir/weights, a folder of weights with the trained parts in it.

    Raises:
      UserError: see `system.load_decoder` and `pairs.read_pairs`; or `config.decoder.trainable` matches nothing; or
        the run would overwrite the weights that it starts from.
    """
    where = system.weights_folder(config)
    if where.resolve() == (workdir / "weights").resolve():
        raise UserError(f"config.weights = {str(where)!r} is where this run writes its own: choose another --workdir")
    settings = config.decoder
    dtype = jnp.dtype(config.dtype)
    source = read(config)
    captioner = folder.load_model(where / "captioner", mesh, dtype)
    tokenizer = system.load_tokenizer(where / "captioner")
    drawn_by, frozen = system.load_decoder(where, config, mesh)
    modules = diffusion.Modules(Qwen2_5_VL(captioner.config, dtype, config.remat), *drawn_by)
    prompts = Prompts.build(tokenizer, config, captioner.config)
    frozen["start"] = captioner.params
    size = config.data.image_size
    shape = decoder.latent_shape(modules.transformer, modules.vae, size, size)
    shift = settings.shift or 1.0
    if modules.scheduler is not None and not settings.shift:
        shift = modules.scheduler.shift_of(shape[0] * shape[1] // decoder.patch(modules.transformer) ** 2)

    def loss(params: Params, frozen: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        latent_key, noise_key, level_key = jax.random.split(key, 3)
        if "moments" in batch:
            assert modules.vae is not None
            clean = decoder.latents_from_moments(batch["moments"], modules.vae, latent_key)
        else:
            clean = decoder.latents_from_pixels(batch["image"], modules.vae, frozen.get("vae"), latent_key)
        weights = merge({name: frozen[name] for name in (*PARTS, "pooled")}, lora.scaled(params, settings.lora.alpha))
        ids, mask = captions_as_text(
            batch["tokens"], batch["length"], prompts.redraw_prefix, prompts.redraw_suffix, prompts.end_token
        )
        states = diffusion.text_states(modules.captioner, frozen["start"], ids, mask)
        text = apply(modules.projector, weights["projector"], states)
        noise = jax.random.normal(noise_key, clean.shape)
        normal = settings.level_mean + settings.level_std * jax.random.normal(level_key, clean.shape[:1])
        level = flow.shifted(jax.nn.sigmoid(normal), shift)
        sigma = level[:, None, None, None]
        noised = (1 - sigma) * clean + sigma * noise
        prediction = decoder.draw_step(
            modules.transformer, weights, noised, text, level, mask if config.mask_text else None
        ).astype(jnp.float32)
        target = noise - clean if config.redraw.prediction == "velocity" else clean
        value = ((prediction - target) ** 2).mean()
        return value, {"loss": value, "caption/length": batch["length"].mean()}

    rules = (
        *folder.rules({"start": captioner.config}, mesh),
        *system.decoder_rules(drawn_by, mesh),
        *optimizers.RULES,
    )

    def trained(parts: Params) -> Params:
        params: Params = system.trainable(parts, settings.trainable) if settings.trainable else {}
        if not settings.lora.rank:
            return params
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return merge(params, lora.initial(parts, settings.lora.rank, settings.lora.target, key))

    params = sharding.made(trained, {name: frozen[name] for name in PARTS}, mesh=mesh, rules=rules)
    optimizer = optimizers.make(settings.optimizer, optimizers.schedule(settings.optimizer, settings.steps))
    state = State(
        jnp.int32(0),
        jax.random.key(config.seed),
        params,
        sharding.made(optimizer.init, params, mesh=mesh, rules=rules),
        jnp.int32(0),
    )
    if settings.ema:
        state = state.replace(ema=jax.tree.map(jnp.copy, params))

    def finish(state: State, writer: Any) -> None:
        learnt = state.ema if settings.ema else state.params
        write_weights(where, workdir / "weights", jax.device_get(learnt), settings.lora.alpha)
        writer.message(f"wrote {workdir / 'weights'}")

    return Program(
        state=state,
        frozen=frozen,
        rules=rules,
        step=sharding.under(mesh, coldstart.supervised_step(loss, optimizer, settings.ema)),
        batches=pairs.PairBatches(
            source,
            tokenizer,
            image_size=size,
            batch_size=settings.batch_size,
            length=settings.max_tokens,
            end_token=prompts.end_token,
            dropout=settings.dropout,
            negative=prompts.negative,
            seed=config.seed,
            latents=kept(config, where / "vae", modules.vae, frozen.get("vae"), source, mesh),
        ),
        steps=settings.steps,
        columns={"loss": ("loss", ".4f"), "caption/length": ("length", ".1f")},
        evaluate=lambda state, writer: {},
        finish=finish,
    )


def read(config: Any) -> pairs.Pairs:
    """The pairs that `config.data` names."""
    if config.data.source == "jsonl":
        return pairs.read_pairs(config.data.path)
    settings = config.decoder
    return pairs.TfdsPairs(config.data.path, settings.split, settings.image_key, settings.caption_key)


def kept(
    config: Any, where: Path, vae: AutoencoderKL | None, params: Params, source: pairs.Pairs, mesh: jax.sharding.Mesh
) -> latents.Latents | None:
    """The pictures' Gaussians in `config.decoder.latents`, encoded first if it has not got them; None without a folder.

    Raises:
      UserError: there is no VAE, or see `latents.cached`.
    """
    if not config.decoder.latents:
        return None
    if vae is None:
        raise UserError(f"config.decoder.latents = {config.decoder.latents!r}: there is no {where} to encode with")
    size = config.data.image_size
    place = Path(config.decoder.latents) / latents.key(where, config.dtype, size, latents.identity(source))
    compiled = jax.jit(lambda p, x: decoder.moments_from_pixels(x.astype(jnp.float32) / 255.0, vae, p))

    def encode(images: np.ndarray) -> np.ndarray:
        return jax.device_get(compiled(params, sharding.place_batch({"image": images}, mesh)["image"]))

    return latents.cached(place, source, size, encode, config.decoder.batch_size)


def write_weights(source: Path, target: Path, learnt: Params, alpha: float) -> None:
    """A folder of weights: projector and transformer with what was learnt, links to all else that `source` holds.

    Args:
      learnt: {part: {...}}, leaves of the parts' parameters, and adapters.
      alpha: of the adapters.
    """
    shutil.rmtree(target, ignore_errors=True)  # of the same run, which has been continued
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name not in PARTS:
            (target / path.name).symlink_to(path.resolve())
    for name in PARTS:
        leaves = {k: np.asarray(x) for k, x in traverse_util.flatten_dict(learnt.get(name, {}), sep="/").items()}
        shapes = {path: x.shape for path, x in leaves.items()}
        transfer.copy_model(source / name, target / name, transfer.Trained(shapes, leaves.__getitem__, alpha))
