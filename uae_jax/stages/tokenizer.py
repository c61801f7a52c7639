"""Stage `tokenizer`: a VQ tokenizer learns to draw scenes through its codes.

Pixels and codebook alone (van den Oord et al. 2017, with directions for latents as in Yu et al. 2021): scenes are flat
colours, for which neither an adversary nor a perceptual network is needed.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import optimizers
from uae_jax.convert import folder
from uae_jax.models import apply, initial
from uae_jax.models.janus.vq import VQModel, directions
from uae_jax.sharding import Split
from uae_jax.stages import Program, coldstart
from uae_jax.step import Metrics, State
from uae_jax.umm import Params

MEMORY = 0.99  # of how often a code was used, a step
DEAD = 0.5  # a code used less than this, in about 1 / (1 - MEMORY) steps, is restarted


def restarted(
    key: jax.Array, codebook: jax.Array, usage: jax.Array, latents: jax.Array, error: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The codebook with dead codes moved onto latents that are badly met, drawn by squared error (as k-means++ seeds).

    Args:
      codebook: [n, e].
      usage: [n], see `MEMORY`; of a code that is moved it becomes 1.
      latents: [..., e].
      error: [...], their squared distance to their codes.
    """
    latents, error = latents.reshape(-1, latents.shape[-1]), error.reshape(-1)
    chosen = jax.random.categorical(key, jnp.log(error + 1e-12), shape=usage.shape)
    dead = usage < DEAD
    return jnp.where(dead[:, None], latents[chosen], codebook), jnp.where(dead, 1.0, usage)


def build(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program; `finish` writes the tokenizer to workdir/weights."""
    settings = config.tokenizer
    size = config.data.image_size
    model = VQModel(coldstart.model_config(config, "tokenizer"))

    def loss(params: Params, frozen: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        weights = params["tokenizer"]
        images = 2 * batch["image"] - 1
        latents = directions(apply(model, weights, images, method="encode"))
        codes = apply(model, weights, latents, method="quantise")
        vectors = apply(model, weights, codes, method="lookup")
        meets = ((vectors - jax.lax.stop_gradient(latents)) ** 2).mean()
        commits = ((jax.lax.stop_gradient(vectors) - latents) ** 2).mean()
        # The decoder reads the codes; the gradient goes on to the latents as if these were they.
        drawn = apply(
            model, weights, latents + jax.lax.stop_gradient(vectors - latents), method="decode_latents"
        ).astype(jnp.float32)
        error = (drawn - images) ** 2
        # The background is what the corner shows; objects are few pixels and would be learned last.
        objects = jnp.abs(images - images[:, :1, :1]).max(-1, keepdims=True) > 0.1
        weight = 1.0 + (settings.object_weight - 1.0) * objects
        pixels = (weight * (error + settings.absolute * jnp.abs(drawn - images))).mean()
        value = pixels + meets + settings.commitment * commits
        counts = jnp.zeros(model.config.num_embeddings).at[codes.reshape(-1)].add(1.0)
        share = counts / counts.sum()
        return value, {
            "loss": value,
            "error/pixels": error.mean(),
            "error/objects": (objects * error).sum() / (3 * objects.sum()),
            "error/latents": commits * latents.shape[-1],
            "codes/perplexity": jnp.exp(-(share * jnp.log(share + 1e-12)).sum()),
            "codes/counts": counts,
            "latents": latents,
            "latents/error": ((vectors - latents) ** 2).sum(-1),
        }

    def step(state: State, frozen: Any, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        state, metrics = learn(state, frozen, batch)
        weights, usage = state.params["tokenizer"], state.params["usage"]
        usage = MEMORY * usage + metrics.pop("codes/counts")
        metrics["codes/restarted"] = (usage < DEAD).sum()
        codebook, usage = restarted(
            key, weights["codebook"], usage, metrics.pop("latents"), metrics.pop("latents/error")
        )
        params = {"tokenizer": weights | {"codebook": codebook}, "usage": usage}
        return state.replace(params=params), metrics

    params = {
        "tokenizer": initial(model, jax.random.key(config.seed + 3), jnp.zeros((1, size, size, 3))),
        # No code has been used: the first batch places them all.
        "usage": jnp.zeros(model.config.num_embeddings),
    }
    optimizer = optimizers.make(settings.optimizer, optimizers.schedule(settings.optimizer, settings.steps))
    learn = coldstart.supervised_step(loss, optimizer)

    def finish(state: State, writer: Any) -> None:
        trained = jax.device_get(state.params)["tokenizer"]
        folder.save_model(workdir / "weights" / "tokenizer", model.config, trained, np.float16)

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={},
        rules=(
            *folder.rules({"tokenizer": model.config}, mesh),
            ("usage", Split.COPIED),
            *optimizers.RULES,
        ),
        step=step,
        batches=coldstart.SceneBatches(
            config.seed, settings.batch_size, size, lambda scenes, rng, step: {}, coldstart.uniform_scenes
        ),
        steps=settings.steps,
        columns={
            "loss": ("loss", ".4f"),
            "error/pixels": ("pixels", ".4f"),
            "error/objects": ("objects", ".4f"),
            "codes/perplexity": ("codes", ".0f"),
        },
        evaluate=lambda state, writer: {},
        finish=finish,
    )
