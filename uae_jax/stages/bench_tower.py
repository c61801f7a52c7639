"""Stage `bench_tower`: two more towers for Unified-Bench, of other architectures and other lessons than the reward's.

The SigLIP matches scenes with their complete captions, by the sigmoid loss (Zhai et al. 2023). The DINOv2 sees pictures
alone, as DINO does: two augmented views of a scene are to be alike among scenes that differ in one attribute (the loss
is the contrastive one of SimCLR, on the class token). No reward names them, and they share no weights with anything.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from uae_jax import optimizers, pixels, rewards
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.scene import Scene
from uae_jax.data.text import encode_captions
from uae_jax.models import apply, initial
from uae_jax.models.dinov2.model import DINOv2
from uae_jax.models.siglip.model import SigLIP
from uae_jax.stages import Program, coldstart
from uae_jax.stages.tower import augment, paired_scenes
from uae_jax.step import Metrics, State

TEMPERATURE = 0.1  # of the views' cosines
START_SCALE, START_BIAS = np.log(10.0), -10.0  # of SigLIP's logits: at first nothing matches
# Positions start this much louder than the models' own initialisation: neither has CLIP's norm before its layers, and
# patches that are as loud as these drown positions of 0.02. A tower so begun never learnt where an object stands.
LOUDER = 25.0


def agree(dino: DINOv2, how: pixels.Processing, params: Any, views: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric cross-entropy of two views [2, b, H, W, 3], and the share whose own other view is the nearest."""
    first, second = rewards.unit(apply(dino, params, pixels.process(views, how))[..., 0, :])
    logits = first @ second.T / TEMPERATURE
    labels = jnp.arange(len(logits))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)]
    return sum(losses) / 2, (logits.argmax(-1) == labels).mean()


def match(
    siglip: SigLIP, how: pixels.Processing, params: Any, images: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """SigLIP's sigmoid loss of images [b, H, W, 3] and captions [b, t], and the share whose own caption is nearest."""
    image, text, scale, bias = apply(siglip, params, pixels.process(images, how), tokens)
    logits = scale * rewards.unit(image) @ rewards.unit(text).T + bias
    own = jnp.eye(len(images))
    value = optax.sigmoid_binary_cross_entropy(logits, own).sum(-1).mean()
    return value, (logits.argmax(-1) == jnp.arange(len(images))).mean()


def build(config: Any, workdir: Path, tokenizer: Tokenizer, end_token: int, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program; `finish` writes the two model folders, with their processing, to workdir/weights."""
    settings, size = config.bench_tower, config.data.image_size
    dino = DINOv2(coldstart.model_config(config, "dinov2"))
    siglip = SigLIP(coldstart.model_config(config, "siglip"))
    # Released DINOv2s see 224 pixels; this one sees scenes as they are.
    hows = {
        "dinov2": pixels.processing(dino.config)._replace(size=size, shortest=size),
        "siglip": pixels.processing(siglip.config),
    }

    def fields(scenes: list[Scene], rng: np.random.Generator, step: int) -> dict[str, np.ndarray]:
        tokens, _ = encode_captions(tokenizer, [grammar.complete(s) for s in scenes], grammar.LONGEST + 1, end_token)
        return {"tokens": tokens}

    def loss(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        images = batch["image"]
        views = jnp.stack([augment(images, jax.random.fold_in(key, i)) for i in range(2)])
        alike, seen = agree(dino, hows["dinov2"], params["dinov2"], views)
        matched, read = match(siglip, hows["siglip"], params["siglip"], views[0], batch["tokens"])
        return alike + matched, {"loss": alike + matched, "accuracy/dinov2": seen, "accuracy/siglip": read}

    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), 2)
    blank, tokens = jnp.zeros((1, size, size, 3)), jnp.zeros((1, grammar.LONGEST + 1), jnp.int32)
    params = {"dinov2": initial(dino, keys[0], blank), "siglip": initial(siglip, keys[1], blank, tokens)}
    params["siglip"] |= {"logit_scale": jnp.full(1, START_SCALE), "logit_bias": jnp.full(1, START_BIAS)}
    params["dinov2"]["position_embeddings"] *= LOUDER
    params["siglip"]["vision"]["position_embedding"] *= LOUDER
    optimizer = optimizers.make(settings.optimizer, optimizers.schedule(settings.optimizer, settings.steps))

    def finish(state: State, writer: Any) -> None:
        params = jax.device_get(state.params)
        for name, module in (("dinov2", dino), ("siglip", siglip)):
            target = workdir / "weights" / name
            folder.save_model(target, module.config, params[name], np.float16)
            pixels.save(target, hows[name])

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={},
        rules=(*folder.rules({"dinov2": dino.config, "siglip": siglip.config}, mesh), *optimizers.RULES),
        step=coldstart.supervised_step(loss, optimizer),
        batches=coldstart.SceneBatches(config.seed, settings.batch_size, size, fields, paired_scenes),
        steps=settings.steps,
        columns={
            "loss": ("loss", ".3f"),
            "accuracy/dinov2": ("dinov2", ".3f"),
            "accuracy/siglip": ("siglip", ".3f"),
        },
        evaluate=lambda state, writer: {},
        finish=finish,
    )
