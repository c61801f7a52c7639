"""Stage `rl`: Unified-GRPO, with the held-out comparison before and after."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax import optimizers, pictures, rewards, step, storage, system
from uae_jax.bench.held_out import Evaluator, Results
from uae_jax.data import sources
from uae_jax.data.shapes.scene import split_seed
from uae_jax.data.text import decode_captions
from uae_jax.stages import Program
from uae_jax.step import STARTING_WEIGHTS, State
from uae_jax.umm import Params

# Scenes in the training split's index: more than any run on a laptop reads.
TRAIN_SCENES = 1_000_000

COLUMNS = {
    "reward/mean": ("reward", ".4f"),
    "caption/length": ("length", ".1f"),
    "kl": ("KL", ".4f"),
    "caption/malformed": ("malformed", ".3f"),
    "throughput/images_per_s": ("images/s", ".1f"),
}


HEADLINES = (
    "reward",
    "reward_second_tower",
    "reward_ceiling",
    "caption_length",
    "caption_recall",
    "caption_precision",
    "caption_malformed",
    "perception",
    "redraw_accuracy",
)


def build(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program."""
    built = system.load(config, mesh)
    train, images, scenes = load_data(config)
    state, optimizer = start(config, built)
    run_step = step.make_step(
        config,
        built.family(config, mesh),
        built.towers,
        optimizer,
        end_token=built.prompts.end_token,
        automaton=built.automaton,
        mesh=mesh,
    )
    evaluator = Evaluator(config, built, mesh, images, scenes) if config.eval.enabled else None
    gallery = Gallery(config, built, mesh, images[: config.eval.pictures])

    def evaluate(state: State, writer: Any) -> None:
        if evaluator is None:
            return
        at = int(state.step)
        if at == 0:
            writer.message(f"evaluating the start on {len(images)} held-out images")
            write_results(workdir, "before", evaluator.run(STARTING_WEIGHTS))
        writer.image(at, "held_out", gallery.draw(state.params))

    def finish(state: State, writer: Any) -> None:
        if evaluator is None:
            return
        writer.message(f"evaluating the end on {len(images)} held-out images")
        results = write_results(workdir, "after", evaluator.run(state.params))
        writer.table("held-out comparison", ["", "before", "after"], comparison(results))

    return Program(
        state=state,
        frozen=built.frozen,
        step=run_step,
        batches=train,
        steps=config.steps,
        columns=COLUMNS,
        evaluate=evaluate,
        finish=finish,
    )


def start(config: Any, built: system.System) -> tuple[State, optax.GradientTransformation]:
    """The state before the first update, and the optimizer it belongs to."""
    params = {"encoder": system.trainable(built.frozen["start"], config.trainable)}
    optimizer = optimizers.make(config.optimizer, optimizers.schedule(config.optimizer, config.steps))
    return State(jnp.int32(0), jax.random.key(config.seed), params, optimizer.init(params), jnp.int32(0)), optimizer


def load_data(config: Any) -> tuple[Any, np.ndarray, list[Any] | None]:
    """Training batches by step, held-out images uint8 [n, H, W, 3], and their scenes where these are known."""
    data = config.data
    train: sources.Source
    if data.source == "shapes":
        seeds = [split_seed(config.seed, split) for split in ("train", "eval")]
        train = sources.ShapesSource(seeds[0], TRAIN_SCENES, data.image_size, data.max_objects)
        held_out = sources.ShapesSource(seeds[1], data.held_out, data.image_size, data.max_objects)
        examples = [held_out[i] for i in range(len(held_out))]
        indices: Any = range(len(train))
        scenes = [example["scene"] for example in examples]
    else:
        train = sources.FolderSource(data.path, data.image_size)
        indices, kept = sources.split(train, data.held_out)
        examples = [train[i] for i in kept]
        scenes = None
    batches = sources.batches(train, indices, data.batch_size, config.seed)
    return batches, np.stack([example["image"] for example in examples]), scenes


class Gallery:
    """The same held-out images, captioned and redrawn with the same keys at every evaluation."""

    def __init__(self, config: Any, built: system.System, mesh: jax.sharding.Mesh, images: np.ndarray):
        self.built, self.images = built, images
        family = built.family(config, mesh=None)
        keys = step.sample_keys(jax.random.key(config.seed), jnp.int32(0), len(images), config.rl.group_size)

        @jax.jit
        def roll(params: Params, frozen: Params, images: jax.Array) -> tuple[jax.Array, ...]:
            captions = family.generate(params, frozen, images, keys)
            redrawn = family.redraw(params, frozen, captions, images, keys)
            values = rewards.similarities(built.towers, frozen["towers"], images, redrawn)
            return captions.actions, captions.mask, redrawn, rewards.weighted_sum(values, config.reward)

        self.roll = roll

    def draw(self, params: Params) -> np.ndarray:
        """A contact sheet uint8 [H, W, 3]: source, best and worst redraw of each group, captions under them."""
        images = self.images.astype(np.float32) / 255.0
        actions, mask, redrawn, reward = jax.device_get(self.roll(params, self.built.frozen, images))
        rows, captions = [], []
        for i, image in enumerate(self.images):
            texts = decode_captions(self.built.tokenizer, actions[i], mask[i])
            best, worst = int(reward[i].argmax()), int(reward[i].argmin())
            rows.append([image, redrawn[i, best], redrawn[i, worst]])
            captions.append(["", *(f"{reward[i, j]:.3f}  {texts[j]}" for j in (best, worst))])
        return pictures.grid(rows, captions, ["source", "best", "worst"], scale=max(1, 144 // images.shape[1]))


def write_results(workdir: Path, when: str, results: Results) -> dict[str, Results]:
    """Adds `results` to workdir/eval.json under `before` or `after`, and returns all of it."""
    path = workdir / "eval.json"
    with storage.storage_errors(path):
        everything = json.loads(path.read_text()) if path.exists() and when != "before" else {}
        everything[when] = results
        path.write_text(json.dumps(everything, indent=2) + "\n")
    return everything


def comparison(results: dict[str, Results]) -> list[list[str]]:
    """Rows (name, before, after) of the final table."""

    def flatten(tree: Any, prefix: str = "") -> dict[str, float]:
        if isinstance(tree, dict):
            flat: dict[str, float] = {}
            for name, value in tree.items():
                flat |= flatten(value, f"{prefix}{name} / " if isinstance(value, dict) else f"{prefix}{name}")
            return flat
        return {prefix: tree} if isinstance(tree, float) else {}

    columns = [flatten(results.get(when, {})) for when in ("before", "after")]
    # The reward and what must be read beside it first, then details in groups.
    names = sorted(dict.fromkeys([*columns[0], *columns[1]]), key=lambda name: (name.count("/"), order(name)))
    return [[name, *(f"{c[name]:.3f}" if name in c else "-" for c in columns)] for name in names]


def order(name: str) -> tuple[int, str]:
    """Sorts headlines as they are listed and everything else by name."""
    return (HEADLINES.index(name) if name in HEADLINES else len(HEADLINES), name)
