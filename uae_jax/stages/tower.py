"""Stage `tower`: the reward tower, a second one that training never sees, and the attribute judge.

The two CLIPs learn to match scenes with their complete captions among scenes that differ in one attribute. They differ
in initialisation, data order and augmentation. The judge is another architecture, trained on ground-truth attributes.
All three have parameters of their own, so that one program trains them side by side without any exchange.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from uae_jax import optimizers, rewards
from uae_jax.convert import folder
from uae_jax.data.shapes import facts, grammar
from uae_jax.data.shapes.scene import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, Scene, sample_scene, split_seed
from uae_jax.data.text import encode_captions
from uae_jax.models import apply, initial
from uae_jax.models.cell_classifier.model import CellClassifier
from uae_jax.models.clip.model import CLIP
from uae_jax.stages import Program, coldstart
from uae_jax.step import Metrics, State

TOWERS = ("clip", "clip_second")


def neighbour(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute of one object, or the background, changed."""
    which = int(rng.integers(len(scene.objects)))
    thing = scene.objects[which]
    free = sorted(set(range(CELLS)) - {o.cell for o in scene.objects})
    choices = {"shape": range(len(SHAPES)), "colour": range(len(COLOURS)), "size": range(len(SIZES)), "cell": free}
    field = str(rng.choice([*choices, "background"]))
    if field == "background":
        others = [i for i in range(len(BACKGROUNDS)) if i != scene.background]
        return dataclasses.replace(scene, background=int(rng.choice(others)))
    others = [i for i in choices[field] if i != getattr(thing, field)]
    changed = dataclasses.replace(thing, **{field: int(rng.choice(others))})
    objects = [*scene.objects[:which], changed, *scene.objects[which + 1 :]]
    return dataclasses.replace(scene, objects=tuple(sorted(objects, key=lambda o: o.cell)))


def paired_scenes(seed: int, step: int, batch_size: int) -> list[Scene]:
    """Half a batch of scenes, each followed by a copy with one attribute changed: the negatives that teach detail."""
    rng = np.random.default_rng([seed, step, 2])
    half = batch_size // 2
    scenes = [sample_scene(split_seed(seed, "train"), step * half + i) for i in range(half)]
    return [scene for original in scenes for scene in (original, neighbour(original, rng))]


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness, contrast, shifts of up to two pixels and noise, per image [b, H, W, 3]."""
    b = images.shape[0]
    keys = jax.random.split(key, 4)
    gain = jax.random.uniform(keys[0], (b, 1, 1, 1), minval=0.85, maxval=1.15)
    offset = jax.random.uniform(keys[1], (b, 1, 1, 1), minval=-0.08, maxval=0.08)
    shift = jax.random.randint(keys[2], (b, 2), -2, 3)
    images = jax.vmap(lambda image, s: jnp.roll(image, (s[0], s[1]), (0, 1)))(images, shift)
    noise = 0.03 * jax.random.normal(keys[3], images.shape)
    return jnp.clip((images - 0.5) * gain + 0.5 + offset + noise, 0.0, 1.0)


def contrastive(clip: CLIP, params: Any, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """CLIP's symmetric cross-entropy, and the share of images whose own caption is the nearest."""
    pixels = rewards.normalised(images, clip.config.vision.image_size)
    image, text, scale = apply(clip, params, pixels, tokens)
    logits = jnp.minimum(scale, 100.0) * rewards.unit(image) @ rewards.unit(text).T
    labels = jnp.arange(len(images))
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in (logits, logits.T)]
    return sum(losses) / 2, (logits.argmax(-1) == labels).mean()


def build(config: Any, workdir: Path, tokenizer: Tokenizer, end_token: int, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program; `finish` writes the three model folders to workdir/weights."""
    settings = config.tower
    clip = CLIP(coldstart.model_config(config, "clip"))
    judge = CellClassifier(coldstart.model_config(config, "judge"))
    size = config.data.image_size

    def fields(scenes: list[Scene], rng: np.random.Generator, step: int) -> dict[str, np.ndarray]:
        tokens, _ = encode_captions(tokenizer, [grammar.complete(s) for s in scenes], grammar.LONGEST + 1, end_token)
        grids = [facts.attributes_grid(scene) for scene in scenes]
        return {"tokens": tokens} | {name: np.stack([grid[name] for grid in grids]) for name in grids[0]}

    def loss(params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, Metrics]:
        images, tokens = batch["image"], batch["tokens"]
        metrics: Metrics = {}
        total = jnp.float32(0)
        for name in TOWERS:
            seen = augment(images, key) if name == "clip_second" else images
            value, metrics[f"accuracy/{name}"] = contrastive(clip, params[name], seen, tokens)
            total += value
        # The judge must read redraws too, so it sees noise, never only clean renderings.
        logits = apply(judge, params["judge"], augment(images, jax.random.fold_in(key, 1)))
        losses = {k: optax.softmax_cross_entropy_with_integer_labels(v, batch[k]).mean() for k, v in logits.items()}
        metrics["accuracy/judge"] = jnp.stack([(v.argmax(-1) == batch[k]).mean() for k, v in logits.items()]).min()
        total += sum(losses.values())
        return total, metrics | {"loss": total}

    names = (*TOWERS, "judge")
    keys = dict(zip(names, jax.random.split(jax.random.key(config.seed), len(names)), strict=True))
    blank = jnp.zeros((1, size, size, 3))
    tokens = jnp.zeros((1, grammar.LONGEST + 1), jnp.int32)
    params = {name: initial(clip, keys[name], blank, tokens) for name in TOWERS}
    params["judge"] = initial(judge, keys["judge"], blank)
    optimizer = optimizers.make(settings.optimizer, optimizers.schedule(settings.optimizer, settings.steps))

    def finish(state: State, writer: Any) -> None:
        params = jax.device_get(state.params)
        for name in TOWERS:
            folder.save_model(workdir / "weights" / name, clip.config, params[name], np.float16)
        folder.save_model(workdir / "weights" / "judge", judge.config, params["judge"], np.float16)

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), params, optimizer),
        frozen={},
        rules=(
            *folder.rules({**dict.fromkeys(TOWERS, clip.config), "judge": judge.config}, mesh),
            *optimizers.RULES,
        ),
        step=coldstart.supervised_step(loss, optimizer),
        batches=coldstart.SceneBatches(config.seed, settings.batch_size, size, fields, paired_scenes),
        steps=settings.steps,
        columns={
            "loss": ("loss", ".3f"),
            "accuracy/clip": ("clip", ".3f"),
            "accuracy/clip_second": ("second", ".3f"),
            "accuracy/judge": ("judge", ".3f"),
        },
        evaluate=lambda state, writer: {},
        finish=finish,
    )
