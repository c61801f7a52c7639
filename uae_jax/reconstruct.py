"""Captions and redraws image files, or draws prompts.

    python -m uae_jax.reconstruct --workdir=DIR|--config=FILE IMAGE...
    python -m uae_jax.reconstruct --workdir=DIR|--config=FILE --from_text=PROMPTS [--samples=N] [--baseline=PIPELINE]

The weights are a run's newest (--workdir), or those in a config's folder as they are (--config, with
--config.weights=DIR and other fields as in training).

The first form prints each caption with its scores and writes a side-by-side picture (--out, by default
reconstructions.png in the workdir). The most likely caption, unless --temperature is above 0: then a caption depends on
its image and --seed alone.

The second draws every line of a file (text, or .jsonl with "prompt") into a folder of GenEval's layout (--out, by
default from_text, or baseline, in the workdir). With --baseline a folder of diffusers draws, SD3 or FLUX by its own
text encoders: what the system is to be compared with, at the same size, steps and guidance.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from uae_jax import config as configs
from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "of a training run: its config and newest checkpoint are used", flag_values=FLAGS)
config_flags.DEFINE_config_file(
    "config", None, "instead of a workdir: a config file, for weights as they are", lock_config=True, flag_values=FLAGS
)
flags.DEFINE_string("out", "", "the picture, or with --from_text the folder, to write", flag_values=FLAGS)
flags.DEFINE_string("from_text", "", 'file of prompts to draw: text, or .jsonl with "prompt"', flag_values=FLAGS)
flags.DEFINE_integer("samples", None, "pictures of each prompt, 1 by default", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("baseline", "", "diffusers pipeline that draws the prompts by itself", flag_values=FLAGS)
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

    path = workdir / "config.json"
    try:
        saved = json.loads(path.read_text())
        if isinstance(saved.get("remat"), bool):  # of earlier releases
            saved["remat"] = "full" if saved["remat"] else "none"
        config = ConfigDict(configs.default().to_dict())
        config.update(saved)
        config.reward = ConfigDict(saved.get("reward", config.reward))  # names of towers: no defaults to add
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir: {path} cannot be read ({error}): name the workdir of an rl run") from None


def load_run(config: Any, workdir: Path | None, mesh: Any) -> tuple[Any, Any, int]:
    """The system of a config, and what a run has trained of it: its newest checkpoint, or nothing.

    Returns:
      The `system.System`; parameters as its family takes them; and the step they are of.
    """
    from uae_jax import checkpoint, sharding, system
    from uae_jax.stages import rl
    from uae_jax.step import STARTING_WEIGHTS

    built = system.load(config, mesh)
    if workdir is not None and (workdir / "checkpoints").is_dir():
        state, _ = rl.start(config, built)
        with checkpoint.Checkpointer(workdir / "checkpoints", every=1) as saver:
            restored = saver.restore_latest(checkpoint.abstract(sharding.place(state, mesh, built.rules)))
        if restored is not None:
            return built, restored[0].params, restored[1]
    return built, STARTING_WEIGHTS, 0


def on_these_devices(config: Any) -> None:
    """Changes the mesh of a run, which may have had others, to copies of the weights on every device."""
    config.mesh = {"data": -1, "fsdp": 1}


def reconstruct(workdir: Path | None, paths: list[str], out: Path, config: Any = None, **sampling: Any) -> None:
    """Captions, redraws and scores `paths`.

    Args:
      workdir: of a run, whose newest weights are used; None: those of `config`.
      sampling: temperature, top_k, top_p, max_tokens, seed; None leaves what the config says.

    Raises:
      UserError: no run in `workdir`, or no usable image.
    """
    import jax
    import numpy as np

    from uae_jax import pictures, sharding, storage
    from uae_jax.bench.held_out import Evaluator
    from uae_jax.data import images
    from uae_jax.data.text import decode_captions

    if workdir is not None:
        config = load_config(workdir)
        on_these_devices(config)
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
    mesh = sharding.make_mesh(config)
    built, params, step = load_run(config, workdir, mesh)
    evaluator = Evaluator(config, built, mesh, np.stack(arrays))
    tokens, mask, _ = evaluator.write(params)
    drawn = evaluator.draw(params, tokens, mask)
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


def draw_prompts(
    workdir: Path | None,
    file: Path,
    out: Path,
    samples: int,
    config: Any = None,
    baseline: Path | None = None,
    seed: int | None = None,
) -> None:
    """Draws the prompts of a file into the folder `out`; see `from_text`.

    Args:
      workdir: as in `reconstruct`.
      file: of prompts.
      samples: pictures of each.
      baseline: diffusers pipeline whose own text encoders and decoder draw; None: the system does.
    """
    import jax

    from uae_jax import from_text, sharding

    if workdir is not None:
        config = load_config(workdir)
        on_these_devices(config)
    prompts = from_text.read_prompts(file)
    config.redraw.same_noise = False
    config.reward, config.monitor = type(config)(), ()  # nothing is scored
    config.eval.batch_size = len(jax.devices()) * -(-min(8, len(prompts)) // len(jax.devices()))
    mesh = sharding.make_mesh(config)
    if baseline is not None:
        draw, by = from_text.by_host(config, baseline, mesh), f"{baseline} itself"
    else:
        built, params, step = load_run(config, workdir, mesh)
        texts = [values["prompt"] for values in prompts]
        draw, by = from_text.by_system(config, built, params, mesh, texts), f"weights of step {step}"
    from_text.write(draw, prompts, out, samples, config.eval.batch_size, config.seed if seed is None else seed)
    print(f"{by}: wrote {samples} x {len(prompts)} pictures to {out}")


USAGE = "usage: python -m uae_jax.reconstruct --workdir=DIR|--config=FILE IMAGE... or --from_text=FILE [--baseline=DIR]"


def main(arguments: list[str]) -> None:
    """Parses the command line and reconstructs, or draws prompts."""
    paths = runtime.parse_flags(FLAGS, arguments)
    config = FLAGS.config
    drawing = bool(FLAGS.from_text)
    sampling = {name: FLAGS[name].value for name in ("temperature", "top_k", "top_p", "max_tokens", "seed")}
    if bool(FLAGS.workdir) == (config is not None) or bool(paths) == drawing:
        raise UserError(USAGE)
    if not drawing and (FLAGS.baseline or FLAGS.samples):
        raise UserError(f"--baseline and --samples are of --from_text; {USAGE}")
    if config is not None:
        configs.validate(config)
        config.unlock()
    runtime.prepare()
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else None
    name = "reconstructions.png" if not drawing else "baseline" if FLAGS.baseline else "from_text"
    out = Path(FLAGS.out or (workdir or Path()) / name)
    if drawing:
        baseline = Path(FLAGS.baseline) if FLAGS.baseline else None
        draw_prompts(workdir, Path(FLAGS.from_text), out, FLAGS.samples or 1, config, baseline, sampling["seed"])
    else:
        reconstruct(workdir, paths, out, config, **sampling)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
