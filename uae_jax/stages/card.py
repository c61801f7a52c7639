"""The card beside cold-start weights: how they were made, what was used, and how well they do."""

import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from uae_jax import sharding, storage, system
from uae_jax.bench.held_out import Evaluator
from uae_jax.bench.scores import Scores
from uae_jax.convert import folder
from uae_jax.metrics import read, trained_seconds
from uae_jax.stages import rl
from uae_jax.step import STARTING_WEIGHTS

TEXT = """# Weights of the tiny world

Made from nothing by

    python -m uae_jax.main --config={name}

with seed {seed}, at commit {commit}, in {minutes} minutes of training ({stages}). Stored as {stored}, under the names
of the reference classes. Remake them with the same command.

| folder | class | parameters |
|---|---|---|
{parts}

## What was used

{used}

## Scores on {images} held-out scenes, before any RL

{scores}
"""


class World(NamedTuple):
    """What is particular to one of the tiny worlds."""

    name: str  # of its cold start's config
    stages: tuple[str, ...]
    parts: tuple[str, ...]
    stored: str
    used: str  # filled with the config's fields


# by the last stage
WORLDS = {
    "decoder": World(
        "configs/tiny_coldstart.py",
        ("tower", "bench_tower", "captioner", "decoder"),
        ("captioner", "projector", "transformer", "clip", "clip_second", "dinov2", "siglip", "judge"),
        "float16 (the projector as float32)",
        """- Scenes are rendered; captions of all stages come from their ground truth. The judge is trained on
  ground-truth attributes, towers on complete true captions among scenes that differ in one attribute.
- Two more towers are for Unified-Bench alone. The SigLIP matches scenes with complete true captions; the DINOv2 sees
  pictures alone: two augmented views of a scene are to be alike, among scenes that differ in one attribute.
- Two more towers are for Unified-Bench alone. The SigLIP matches scenes with complete true captions; the DINOv2 sees
  pictures alone: two augmented views of a scene are to be alike, among scenes that differ in one attribute.
- The captioner is made terse on purpose after it has learned to see: of the captions of its last phase
  {c.captioner.terse_keeps_complete:.0%} are complete, the others name the most striking object, each of its attributes
  with probability {c.captioner.terse_detail}, and the background. Reinforcement learning starts from there.
- The decoder's squared error weighs pixels of objects {c.decoder.object_weight} times (told from the background by
  colour); scenes grow from one object to four. The projector's whitening was fitted once on 2,000 captions.
- Policy, reward tower, unseen tower and judge share no weights. The text encoder is the captioner itself, frozen.""",
    ),
    "joint": World(
        "configs/tiny_ar_coldstart.py",
        ("tokenizer", "joint"),
        ("janus",),
        "float16",
        """- Scenes are rendered; captions come from their ground truth. Towers and judge are those of the other tiny
  world (`weights/tiny`), so that both worlds are measured alike; they share no weights with this model.
- The image tokenizer was trained first and then frozen: errors on objects weigh {c.tokenizer.object_weight} times.
- Captioning and drawing are learned together; scenes grow from one object to four. Images are drawn from captions of
  every length, of which {c.joint.complete:.0%} are complete and {c.joint.dropout:.0%} hidden (for guidance). The
  embedding of image tokens starts as the tokenizer's codebook.
- The model is made terse on purpose after it has learned to see: of the captions that it writes in its last phase
  {c.joint.terse_keeps_complete:.0%} are complete, the others name the most striking object, each of its attributes with
  probability {c.joint.terse_detail}, and the background. Reinforcement learning starts from there.""",
    ),
}


def write(config: Any, workdir: Path, stage: str) -> None:
    """Evaluates workdir/weights on the evaluation split and writes workdir/weights/CARD.md.

    Args:
      stage: the last one, which says which world it is (`WORLDS`).
    """
    world = WORLDS[stage]
    config = config.copy_and_resolve_references()
    config.unlock()
    config.weights = str(workdir / "weights")
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    _, images, scenes = rl.load_data(config)
    evaluation = Evaluator(config, built, mesh, images, scenes).run(STARTING_WEIGHTS)
    seconds = {name: trained_seconds(read(workdir / name), config[name].batch_size) for name in world.stages}
    parts = []
    for name in world.parts:
        model = folder.load_model(workdir / "weights" / name)
        parts.append(f"| {name} | {folder.architecture(model.config.to_hf())} | {folder.count(model.params):,} |")
    text = TEXT.format(
        name=world.name,
        stored=world.stored,
        used=world.used.format(c=config),
        seed=config.seed,
        commit=commit(),
        minutes=round(sum(seconds.values()) / 60),
        stages=", ".join(f"{stage} {round(value / 60)}" for stage, value in seconds.items()),
        parts="\n".join(parts),
        images=len(images),
        scores=rows(evaluation.scores),
    )
    path = workdir / "weights" / "CARD.md"
    with storage.storage_errors(path):
        path.write_text(text)


def rows(scores: Scores) -> str:
    """Markdown rows of all numbers."""
    lines = [
        f"| {name.replace('/', ': ')} | {score.mean:.3f} |" for name, score in scores.items() if score.mean is not None
    ]
    return "\n".join(["| | |", "|---|---|", *lines])


def commit() -> str:
    """The checkout's commit, if this runs from one."""
    here = Path(__file__).parent
    done = subprocess.run(["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
