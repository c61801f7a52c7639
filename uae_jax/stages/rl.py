"""Stage `rl`: Unified-GRPO, with the held-out comparison before and after."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax import gap, hosts, optimizers, pictures, rewards, sharding, step, storage, system
from uae_jax.bench import scores
from uae_jax.bench.held_out import Evaluation, Evaluator
from uae_jax.data import sources
from uae_jax.data.images import BadImage
from uae_jax.data.order import Bad, Order
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.scene import split_seed
from uae_jax.data.text import decode_captions
from uae_jax.errors import UserError
from uae_jax.stages import Program
from uae_jax.step import STARTING_WEIGHTS, Metrics, State
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


def build(config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> Program:
    """The stage as a program."""
    built = system.load(config, mesh)
    if config.offload_frozen:
        built = built._replace(frozen=system.offloaded(built.frozen))
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
    # A live text encoder may leave the frozen decoder behind: what do captions that are known to be right earn?
    reference = [grammar.complete(scene) for scene in (scenes or [])[: config.eval.batch_size]]

    def evaluate_start(evaluator: Evaluator, writer: Any) -> None:
        writer.message(f"evaluating the start on {len(images)} held-out images")
        record(workdir, "before", evaluator.run(STARTING_WEIGHTS))

    def evaluate(state: State, writer: Any) -> Metrics:
        if evaluator is None:
            return {}
        at = int(state.step)
        if at == 0:
            evaluate_start(evaluator, writer)
        gallery.show(state.params, at, writer)
        if config.text_encoder == "frozen" or not reference:
            return {}
        return {"canary/reference_reward": evaluator.reward_of_texts(state.params, reference).mean()}

    def finish(state: State, writer: Any) -> None:
        if evaluator is None:
            return
        if not hosts.from_first((workdir / "eval_before.npz").exists):  # evaluation was off then
            evaluate_start(evaluator, writer)
        writer.message(f"evaluating the end on {len(images)} held-out images")
        evaluation = evaluator.run(state.params)
        moved = record(workdir, "after", evaluation)
        if not hosts.first():
            return
        before = scores.load(workdir / "eval_before.npz")
        writer.table("held-out comparison", scores.HEADER, scores.table(before, evaluation.scores, moved))

    return Program(
        state=state,
        frozen=built.frozen,
        rules=built.rules,
        step=run_step,
        batches=train,
        steps=config.steps,
        columns=COLUMNS,
        evaluate=evaluate,
        finish=finish,
        watch=gap.watch(config),
    )


def start(config: Any, built: system.System) -> tuple[State, optax.GradientTransformation]:
    """The state before the first update, and the optimizer it belongs to."""
    params = sharding.made(
        lambda start: {"encoder": system.trained(start, config)},
        built.frozen["start"],
        mesh=built.mesh,
        rules=built.rules,
    )
    optimizer = optimizers.make(
        config.optimizer, optimizers.schedule(config.optimizer, config.steps * config.rl.inner_epochs)
    )
    opt_state = sharding.made(optimizer.init, params, mesh=built.mesh, rules=built.rules)
    return State(jnp.int32(0), jax.random.key(config.seed), params, opt_state, jnp.int32(0)), optimizer


def load_data(config: Any) -> tuple[sources.Batches, np.ndarray, list[Any] | None]:
    """Training batches by step, held-out images uint8 [n, H, W, 3], and their scenes where these are known.

    Raises:
      UserError: see `records.open_source`; or too many of the held-out images are bad.
    """
    data = config.data
    train: sources.Source
    if data.source == "shapes":
        seeds = [split_seed(config.seed, split) for split in ("train", "eval")]
        train = sources.ShapesSource(seeds[0], TRAIN_SCENES, data.image_size, data.max_objects)
        held_out = sources.ShapesSource(seeds[1], data.held_out, data.image_size, data.max_objects)
        examples = [held_out[i] for i in range(len(held_out))]
        indices: Any = range(len(train))
        scenes = [example["scene"] for example in examples]
        images = np.stack([example["image"] for example in examples])
        return sources.batches(train, indices, data.batch_size, config.seed), images, scenes
    train, groups, weights, tally = sources.open_pictures(config)
    taught, kept = [], []
    for group, weight in zip(groups, weights, strict=True):  # each part gives its share of the held-out images
        some, others = sources.split(group, max(1, round(data.held_out * weight / sum(weights))))
        taught.append([group[i] for i in some])
        kept += [group[i] for i in others]
    images, bad = held_out_images(train, kept)
    tally.add(bad)
    if not len(images):
        shown = "; ".join(f"{name} ({reason})" for name, reason in bad[:5])
        raise UserError(f"none of the {len(bad)} held-out images can be read: {shown}")
    return sources.Batches(train, Order(taught, weights, config.seed), data.batch_size, tally), images, None


def held_out_images(source: sources.Source, indices: list[int]) -> tuple[np.ndarray, list[Bad]]:
    """Those that can be read, uint8 [n, H, W, 3], and what is wrong with the others."""
    found, bad = [], []
    for index in indices:
        try:
            found.append(source[index]["image"])
        except BadImage as error:
            bad.append(Bad(error.path, error.reason))
    return np.stack(found) if found else np.zeros((0,)), bad


class Gallery:
    """The same held-out images, captioned and redrawn with the same keys at every evaluation."""

    def __init__(self, config: Any, built: system.System, mesh: jax.sharding.Mesh, images: np.ndarray):
        self.built, self.images = built, images
        family = built.family(config, mesh=None)
        likeliest = built.family(config, mesh=None, temperature=0.0)
        keys = step.sample_keys(jax.random.key(config.seed), jnp.int32(0), len(images), config.rl.group_size)
        self.keys = sharding.copied(keys, mesh)

        @jax.jit
        def roll(params: Params, frozen: Params, images: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
            """The most likely caption in place 0 and a group of samples after it: tokens, mask, redraws, rewards."""
            one = likeliest.generate(params, frozen, images, keys[:, :1])
            group = family.generate(params, frozen, images, keys)
            captions = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), one, group)
            again = jnp.concatenate([keys[:, :1], keys], axis=1)
            redrawn, _ = family.redraw(params, frozen, captions, images, again)
            values = rewards.similarities(built.towers, frozen["towers"], images, redrawn)
            return captions.actions, captions.mask, redrawn, built.reward(config, captions, values)

        self.roll = roll

    def show(self, params: Params, at: int, writer: Any) -> None:
        """Writes samples/held_out_{at}.png, a contact sheet, and .npz, the redraws of the most likely captions."""
        images = self.images.astype(np.float32) / 255.0
        actions, mask, redrawn, reward = hosts.to_host(self.roll(params, self.built.frozen, images, self.keys))
        rows, captions = [], []
        for i, image in enumerate(self.images):
            texts = decode_captions(self.built.tokenizer, actions[i], mask[i])
            shown = [0, 1 + int(reward[i, 1:].argmax()), 1 + int(reward[i, 1:].argmin())]
            rows.append([image, *redrawn[i, shown]])
            captions.append(["", *(f"{reward[i, j]:.3f}  {texts[j]}" for j in shown)])
        header = ["source", "most likely", "best sample", "worst sample"]
        writer.image(at, "held_out", pictures.grid(rows, captions, header, scale=max(1, 144 // images.shape[1])))
        likeliest = np.stack([pictures.to_uint8(row[1]) for row in rows])
        writer.arrays(at, "held_out", source=self.images, redrawn=likeliest, caption=[row[1] for row in captions])


def record(workdir: Path, when: str, evaluation: Evaluation) -> dict[str, scores.Change | None]:
    """Adds an evaluation to workdir/eval.json under `before` or `after`, and image by image to eval_{when}.npz.

    The file's `change` pairs the two: mean difference and its 95% interval for every score, which is also returned.
    Of several processes the first alone writes; the others get nothing.
    """
    if not hosts.first():
        return {}
    found, captions = evaluation
    scores.save(workdir / f"eval_{when}.npz", found)
    path = workdir / "eval.json"
    with storage.storage_errors(path):
        everything = json.loads(path.read_text()) if path.exists() and when != "before" else {}
    means = scores.nested({name: score.mean for name, score in found.items()})
    everything[when] = {"images": len(captions), "controls": {}, "by_category": {}, **means, "captions": captions[:16]}
    moved: dict[str, scores.Change | None] = {}
    if when == "after" and "before" in everything:
        moved = scores.changes(scores.load(workdir / "eval_before.npz"), found)
        everything["change"] = scores.nested({name: c and c.json() for name, c in moved.items()})
    storage.write_atomic(path, (json.dumps(everything, indent=2) + "\n").encode())
    return moved
