"""Stage `decoder`: projector and MM-DiT learn to draw what captions of every length say, captioner frozen.

Flow matching with logit-normal noise levels (SD3). The tiny world predicts the clean sample with a plain squared error,
which learned where a velocity target of the same size did not; the sampler turns it into a velocity.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from uae_jax import optimizers, sharding
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import encode_captions
from uae_jax.models import apply, initial
from uae_jax.stages import Program, card, coldstart
from uae_jax.step import Metrics, State
from uae_jax.umm import Params, diffusion
from uae_jax.umm import decoder as drawing
from uae_jax.umm.prompts import Prompts, captions_as_text


def whitening(states: np.ndarray, floor: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d] and matrix [d, d] that give `(x - mean) @ matrix` unit variance in every direction, rotating nothing.

    Args:
      states: [n, d].
      floor: variances below this share of the largest are not blown up further.
    """
    mean = states.mean(0)
    variance, directions = np.linalg.eigh(np.cov(states - mean, rowvar=False))
    scale = 1.0 / np.sqrt(np.maximum(variance, floor * variance.max()))
    return mean.astype(np.float32), ((directions * scale) @ directions.T).astype(np.float32)


def build(
    config: Any,
    workdir: Path,
    tokenizer: Tokenizer,
    modules: diffusion.Modules,
    prompts: Prompts,
    captioner_params: Params,
    mesh: jax.sharding.Mesh,
) -> Program:
    """The stage as a program; `finish` writes projector, transformer and the card to workdir/weights."""
    settings = config.decoder
    size, length = config.data.image_size, grammar.LONGEST + 1
    transformer, projector = modules.transformer, modules.projector
    pooled = jnp.zeros(transformer.config.pooled_projection_dim)

    def states_of(params: Params, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids, mask = captions_as_text(tokens, lengths, prompts.redraw_prefix, prompts.redraw_suffix, prompts.end_token)
        return diffusion.text_states(modules.captioner, params, ids, mask), mask

    def captions(scenes: list[Scene], rng: np.random.Generator) -> dict[str, np.ndarray]:
        texts = [
            grammar.complete(s) if rng.random() < settings.complete else grammar.caption(s, rng, rng.uniform(0.3, 1.0))
            for s in scenes
        ]
        tokens, mask = encode_captions(tokenizer, texts, length, prompts.end_token)
        return {"tokens": tokens, "length": mask.sum(1).astype(np.int32) - 1}

    def loss(params: Params, frozen: Params, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        clean = drawing.latents_from_pixels(batch["image"])
        states, mask = states_of(frozen["start"], batch["tokens"], batch["length"])
        text = apply(projector, params["projector"] | frozen["whitening"], states)
        noise_key, level_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        level = jax.nn.sigmoid(settings.level_mean + settings.level_std * jax.random.normal(level_key, clean.shape[:1]))
        sigma = level[:, None, None, None]
        weights = {"transformer": params["transformer"], "pooled": pooled}
        prediction = drawing.draw_step(
            transformer, weights, (1 - sigma) * clean + sigma * noise, text, level, mask if config.mask_text else None
        ).astype(jnp.float32)
        if config.redraw.prediction == "velocity":
            error = prediction - (noise - clean)
        else:
            error = prediction - clean
        # The background is what the corner shows; objects are few pixels and would be learned last.
        objects = jnp.abs(clean - clean[:, :1, :1]).max(-1, keepdims=True) > 0.1
        weight = 1.0 + (settings.object_weight - 1.0) * objects
        value = (weight * error**2).mean()
        return value, {"loss": value, "error/objects": (objects * error**2).sum() / (3 * objects.sum())}

    sample = coldstart.uniform_scenes(config.seed, 0, 2000)
    encoded = captions(sample, np.random.default_rng(config.seed))
    states, mask = jax.jit(states_of)(captioner_params, encoded["tokens"], encoded["length"])
    mean, matrix = whitening(np.asarray(states)[np.asarray(mask)])

    keys = jax.random.split(jax.random.key(config.seed + 2))
    text = jnp.zeros((1, 1, projector.config.out_size))
    latents = jnp.zeros((1, size, size, transformer.config.in_channels))
    params = {
        "projector": initial(projector, keys[0], states[:1]),
        "transformer": initial(transformer, keys[1], latents, text, pooled[None], jnp.zeros(1)),
    }
    params["projector"] = {k: v for k, v in params["projector"].items() if k not in ("mean", "matrix")}
    fixed = {"mean": jnp.asarray(mean), "matrix": jnp.asarray(matrix)}
    optimizer = optimizers.make(settings.optimizer, optimizers.schedule(settings.optimizer, settings.steps))

    def finish(state: State, writer: Any) -> None:
        trained = jax.device_get(state.params)
        weights = workdir / "weights"
        folder.save_model(weights / "projector", projector.config, trained["projector"] | jax.device_get(fixed))
        folder.save_model(weights / "transformer", transformer.config, trained["transformer"], np.float16)
        writer.message("evaluating the weights for their card")
        card.write(config, workdir, "decoder")

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={"start": captioner_params, "whitening": fixed},
        rules=(
            *folder.rules(
                {
                    "start": modules.captioner.config,
                    "projector": projector.config,
                    "transformer": transformer.config,
                },
                mesh,
            ),
            (r"whitening/.*", sharding.Split.COPIED),
            *optimizers.RULES,
        ),
        step=coldstart.supervised_step(loss, optimizer),
        batches=coldstart.SceneBatches(
            config.seed,
            settings.batch_size,
            size,
            lambda scenes, rng, step: captions(scenes, rng),
            coldstart.growing_scenes(settings.curriculum_steps),
        ),
        steps=settings.steps,
        columns={"loss": ("loss", ".4f"), "error/objects": ("objects", ".4f")},
        evaluate=lambda state, writer: {},
        finish=finish,
    )
