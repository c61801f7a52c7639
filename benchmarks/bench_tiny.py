"""Unified-Bench on the tiny world, by four towers of its own: a trained run against its start, under one decoder.

    python -m benchmarks.bench_tiny --workdir=runs/tiny --out=runs/bench [--images=100]

Renders held-out scenes of the run as PNG files (sources/), lets the shipped weights caption and redraw them (start/),
then the run, with the start's captions beside its own (run/): unified_bench.json, .csv and .md, with controls. About
two minutes on two CPU cores.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from uae_jax import evaluate, pictures, reconstruct, runtime
from uae_jax.convert import folder
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/tiny", "of a finished run of configs/tiny.py", flag_values=FLAGS)
flags.DEFINE_string("out", "runs/bench", "where results go", flag_values=FLAGS)
flags.DEFINE_integer("images", 100, "held-out scenes", lower_bound=2, flag_values=FLAGS)

TOWERS = ("clip", "clip_second", "dinov2", "siglip")  # the first is the reward


def render(config: Any, count: int, out: Path) -> None:
    """Writes the first held-out scenes of a run."""
    from uae_jax.data.shapes.scene import split_seed
    from uae_jax.data.sources import ShapesSource

    source = ShapesSource(split_seed(config.seed, "eval"), count, config.data.image_size, config.data.max_objects)
    for i in range(count):
        pictures.save_png(out / f"{i:03d}.png", source[i]["image"])


def main(arguments: list[str]) -> None:
    """Renders, and runs the benchmark twice."""
    try:
        FLAGS(arguments)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    out, workdir = Path(FLAGS.out), Path(FLAGS.workdir)
    config = reconstruct.load_config(workdir)
    runtime.prepare()
    render(config, FLAGS.images, out / "sources")
    weights = Path(config.weights) if config.weights else folder.shipped("tiny")
    towers = ",".join(f"{name}={weights / name}" for name in TOWERS)
    common = ["evaluate", "unified_bench", f"--sources={out / 'sources'}", f"--towers={towers}", "--batch_size=50"]
    evaluate.main([*common, f"--out={out / 'start'}", "--config=configs/tiny.py", f"--weights={weights}"])
    against = f"--against={out / 'start' / 'captions.jsonl'}"
    evaluate.main([*common, f"--out={out / 'run'}", f"--workdir={workdir}", against])


if __name__ == "__main__":
    runtime.run(main, sys.argv)
