"""Stage `captioner`: first see (complete captions), then be terse, so that details pay in RL."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from uae_jax import optimizers
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import encode_captions
from uae_jax.models import initial
from uae_jax.models.qwen2_5_vl import inputs
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.sampling.tokens import Segment
from uae_jax.stages import Program, coldstart
from uae_jax.step import Metrics, State
from uae_jax.umm import Family


def build(
    config: Any,
    workdir: Path,
    tokenizer: Tokenizer,
    end_token: int,
    captioner: Qwen2_5_VL,
    family: Family,
    mesh: jax.sharding.Mesh,
) -> Program:
    """The stage as a program; the loss is the mean of the very log-probs that RL scores with."""
    settings = config.captioner
    size, length = config.data.image_size, grammar.LONGEST + 1

    def fields(scenes: list[Scene], rng: np.random.Generator, step: int) -> dict[str, np.ndarray]:
        share = 1.0 if step < settings.see_steps else settings.terse_keeps_complete
        texts = [
            grammar.complete(s) if rng.random() < share else grammar.terse(s, rng, settings.terse_detail)
            for s in scenes
        ]
        tokens, mask = encode_captions(tokenizer, texts, length, end_token)
        return {"tokens": tokens, "mask": mask}

    def loss(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        tokens, mask = batch["tokens"][:, None], batch["mask"][:, None]
        caption = Segment(tokens, mask, jnp.zeros(tokens.shape))
        scores = family.log_probs(params, frozen, batch["image"], {"caption": caption})["caption"]
        value = -scores.sum() / mask.sum()
        return value, {"loss": value, "caption/length": mask.sum() / len(mask)}

    params = {"encoder": initial_captioner(jax.random.key(config.seed + 1), captioner, size)}
    see = optimizers.schedule(settings.optimizer, settings.see_steps)
    terse = optax.linear_schedule(settings.terse_learning_rate, 0.0, settings.terse_steps)
    optimizer = optimizers.make(settings.optimizer, rate=optax.join_schedules([see, terse], [settings.see_steps]))

    def finish(state: State, writer: Any) -> None:
        target = workdir / "weights" / "captioner"
        folder.save_model(target, captioner.config, jax.device_get(state.params)["encoder"], np.float16)
        tokenizer.save(str(target / "tokenizer.json"))

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={"start": params["encoder"]},
        rules=(
            *folder.rules(dict.fromkeys(("start", "encoder"), captioner.config), mesh),
            *optimizers.RULES,
        ),
        step=coldstart.supervised_step(loss, optimizer),
        batches=coldstart.SceneBatches(
            config.seed, settings.batch_size, size, fields, coldstart.growing_scenes(settings.curriculum_steps)
        ),
        steps=settings.see_steps + settings.terse_steps,
        columns={"loss": ("loss", ".4f"), "caption/length": ("length", ".1f")},
        evaluate=lambda state, writer: {},
        finish=finish,
    )


def initial_captioner(key: jax.Array, captioner: Qwen2_5_VL, image_size: int) -> Any:
    """Random weights of the captioner."""
    vision = captioner.config.vision
    layout, _ = inputs.layout(image_size, image_size, vision)
    patches = inputs.patchify(jnp.zeros((image_size, image_size, 3)), vision)
    tokens = jnp.full(1, captioner.config.image_token_id)
    return initial(captioner, key, patches, layout, tokens, jnp.zeros((3, 1), int), jnp.ones((1, 1), bool))
