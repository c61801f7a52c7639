"""Captions and redraws image files: `python -m uae_jax.reconstruct --workdir=DIR IMAGE...`.

Prints each caption with its scores and writes a side-by-side picture (--out, by default workdir/reconstructions.png).
The most likely caption, unless --temperature is above 0: then a caption depends on its image and --seed alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "of a training run: its config and newest checkpoint are used", flag_values=FLAGS)
flags.DEFINE_string("out", "", "the picture to write; workdir/reconstructions.png by default", flag_values=FLAGS)
flags.DEFINE_float("temperature", None, "of captions; 0: the most likely token", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("top_k", None, "draw among the k most likely tokens; 0: all", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float("top_p", None, "draw among the fewest tokens that reach p; 1: all", 1e-6, 1.0, flag_values=FLAGS)
flags.DEFINE_integer("max_tokens", None, "longest caption", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", None, "of captions and noise", flag_values=FLAGS)


def load_config(workdir: Path) -> Any:
    """The config that a run has left in its workdir; fields that are newer than the run have their default.

    Raises:
      UserError: there is none.
    """
    from ml_collections import ConfigDict

    from uae_jax import config as base

    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
        if isinstance(saved.get("remat"), bool):  # of earlier releases
            saved["remat"] = "full" if saved["remat"] else "none"
        config = ConfigDict(base.default().to_dict())
        config.update(saved)
        config.reward = ConfigDict(saved.get("reward", config.reward))  # names of towers: no defaults to add
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir: {path} cannot be read ({error}): name the workdir of an rl run") from None


def reconstruct(workdir: Path, paths: list[str], out: Path, **sampling: Any) -> None:
    """Captions, redraws and scores `paths` with the newest weights of a run.

    Args:
      sampling: temperature, top_k, top_p, max_tokens, seed; None leaves what the run's config says.

    Raises:
      UserError: no run in `workdir`, or no usable image.
    """
    import jax
    import numpy as np

    from uae_jax import checkpoint, pictures, sharding, storage, system
    from uae_jax.bench.held_out import Evaluator
    from uae_jax.data import images
    from uae_jax.data.text import decode_captions
    from uae_jax.stages import rl

    config = load_config(workdir)
    places = {"max_tokens": config.rl, "seed": config}
    for name, value in sampling.items():
        if value is not None:
            places.get(name, config.eval)[name] = value
    usable, arrays = [], []
    for path in paths:
        try:
            arrays.append(images.fit(images.load_image(path), config.data.image_size))
            usable.append(path)
        except images.BadImage as error:
            print(f"skipped {error}", file=sys.stderr)
    if not usable:
        raise UserError(f"none of the {len(paths)} files is a usable image")
    config.eval.batch_size = len(jax.devices()) * -(-len(usable) // len(jax.devices()))
    config.mesh = {"data": -1, "fsdp": 1}
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    state, _ = rl.start(config, built)
    step = 0
    if (workdir / "checkpoints").is_dir():
        with checkpoint.Checkpointer(workdir / "checkpoints", every=1) as saver:
            restored = saver.restore_latest(checkpoint.abstract(sharding.place(state, mesh, built.rules)))
        if restored is not None:
            state, step = restored
    evaluator = Evaluator(config, built, mesh, np.stack(arrays))
    tokens, mask, _ = evaluator.write(state.params)
    drawn = evaluator.draw(state.params, tokens, mask)
    rows, captions = [], []
    print(f"weights of step {step}")
    for i, text in enumerate(decode_captions(built.tokenizer, tokens, mask)):
        scores = "  ".join(f"{name} {values[i]:.3f}" for name, values in drawn["towers"].items())
        print(f"{usable[i]}\n  {text}\n  {scores}")
        rows.append([arrays[i], drawn["image"][i]])
        captions.append([Path(usable[i]).name, f"{scores}  {text}"])
    sheet = pictures.grid(rows, captions, ["source", "redrawn"], scale=max(1, 192 // config.data.image_size))
    with storage.storage_errors(out):
        pictures.save_png(out, sheet)
    print(f"wrote {out}")


def main(arguments: list[str]) -> None:
    """Parses the command line and reconstructs."""
    try:
        paths = FLAGS(arguments)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if not FLAGS.workdir or not paths:
        raise UserError("usage: python -m uae_jax.reconstruct --workdir=DIR IMAGE...")
    runtime.prepare()
    workdir = Path(FLAGS.workdir)
    sampling = {name: FLAGS[name].value for name in ("temperature", "top_k", "top_p", "max_tokens", "seed")}
    reconstruct(workdir, paths, Path(FLAGS.out or workdir / "reconstructions.png"), **sampling)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
