"""Model folders in and out of training.

    python -m uae_jax.convert import HF_DIR OUT_DIR [--lora=FILE]
    python -m uae_jax.convert export OUT_DIR|WEIGHTS_DIR|WORKDIR HF_DIR [--adapter|--umm]

`import` checks a downloaded folder and copies it: OUT_DIR is one model's folder, such as WEIGHTS_DIR/captioner where
config.weights = WEIGHTS_DIR. Of a whole diffusers pipeline OUT_DIR is WEIGHTS_DIR, to which transformer/, vae/ and
scheduler/ are added; its text encoders are read for the pooled vector of an empty prompt.
Of UniWorld-V1's bundle it is WEIGHTS_DIR too, into which FLUX.1-dev has been imported: captioner/ and projector/ are
added, and its transformer/ takes FLUX's place. `--lora` merges an adapter of the transformer, as diffusers saves it.

`export` writes a folder that transformers loads: of an imported model, of the captioner in a folder of weights, or of
the captioner that a run has trained (its newest checkpoint over the weights it started from, adapters merged). Of stage
`decoder` on pictures with captions (WORKDIR/decoder) it is the transformer, as diffusers loads it. With `--adapter` the
adapters alone are written, as a PEFT folder (a transformer's as diffusers' pipelines save and load them); with `--umm`
the whole system of a run, with a model card and a page of PyTorch that runs it.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from uae_jax import runtime
from uae_jax.errors import UserError

USAGE = (
    "usage: python -m uae_jax.convert import HF_DIR OUT_DIR [--lora=FILE], "
    "or export OUT_DIR|WORKDIR HF_DIR [--adapter|--umm]"
)


def export(source: Path, target: Path, adapter: bool, whole: bool = False) -> str:
    """Writes `source` (a model's folder, a folder of weights, or a workdir) as a Hugging Face folder.

    Returns:
      What was done. Raises UserError where `source` is none of these, or see `transfer.copy_model`.
    """
    from uae_jax import checkpoint, system
    from uae_jax.convert import folder, transfer, umm
    from uae_jax.reconstruct import load_config

    if whole and not (source / "config.json").is_file():
        raise UserError(
            f"--umm: {source} is not the workdir of a run, whose config.json says how its parts go together"
        )
    if not (source / "config.json").exists():
        source = next((source / name for name in ("captioner", system.JANUS) if (source / name).is_dir()), source)
    raw = folder.load_config(source)
    if folder.architecture(raw):
        if adapter or whole:
            raise UserError(f"--{'adapter' if adapter else 'umm'}: {source} is a model, not the workdir of a run")
        return transfer.copy_model(source, target)
    if "weights" not in raw:
        raise UserError(f"{source} is neither a model's folder, a folder of weights, nor the workdir of a run")
    config = load_config(source)
    step = checkpoint.latest_step(source / "checkpoints")
    if source.name == "decoder" and "decoder" in config:
        return _export_decoder(source, target, config, step, adapter, whole)
    if whole and step is None:
        return umm.export(config, target, transfer.NOTHING, f"{system.weights_folder(config)}, untrained")
    if step is None:
        raise UserError(f"{source}/checkpoints holds no complete checkpoint: there is nothing trained to export")
    leaves = checkpoint.open_leaves(source / "checkpoints", step, "params/encoder/")
    trained = transfer.Trained(leaves.shapes, leaves.read, config.get("lora", {}).get("alpha", 1.0))
    if whole:
        return umm.export(config, target, trained, f"step {step} of {source}")
    start = system.captioner_folder(config)
    if adapter:
        done = transfer.export_adapter(start, target, trained)
    else:
        done = transfer.copy_model(start, target, trained)
    return f"{done}; step {step} of {source}"


def _export_decoder(source: Path, target: Path, config: Any, step: int | None, adapter: bool, whole: bool) -> str:
    """`export` of a run of stage `decoder`: its transformer."""
    from uae_jax import checkpoint, system
    from uae_jax.convert import transfer

    if whole or step is None:
        why = "--umm is of rl runs" if whole else "there is no complete checkpoint"
        raise UserError(
            f"{source}: {why}; the weights that this stage writes at its end are in {source.parent}/weights"
        )
    leaves = checkpoint.open_leaves(
        source / "checkpoints", step, f"{'ema' if config.decoder.ema else 'params'}/transformer/"
    )
    alpha = config.decoder.get("lora", {}).get("alpha", 1.0)
    write = transfer.export_adapter if adapter else transfer.copy_model
    start = system.weights_folder(config) / "transformer"
    return f"{write(start, target, transfer.Trained(leaves.shapes, leaves.read, alpha))}; step {step} of {source}"


def main(arguments: list[str]) -> None:
    """Parses the command line and converts."""
    if "--help" in arguments:
        print(__doc__)
        return
    flags = [word for word in arguments[1:] if word.startswith("-")]
    words = [word for word in arguments[1:] if word not in flags]
    allowed = {"import": ("--lora=",), "export": ("--adapter", "--umm")}.get(words[0] if words else "", ())
    if (
        len(words) != 3
        or len(flags) > 1
        or not allowed
        or any("".join(flag.partition("=")[:2]) not in allowed for flag in flags)
    ):
        raise UserError(USAGE)
    runtime.prepare()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a run may be using the accelerator
    # A stop leaves no half-written folder either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    source, target = Path(words[1]), Path(words[2])
    if words[0] == "import":
        from uae_jax.convert import pipeline

        done = pipeline.import_folder(source, target, *(Path(flag.removeprefix("--lora=")) for flag in flags))
    else:
        done = export(source, target, "--adapter" in flags, "--umm" in flags)
    print(f"wrote {target}: {done}")


if __name__ == "__main__":
    runtime.run(main, sys.argv)
