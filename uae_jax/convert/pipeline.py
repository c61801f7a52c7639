"""Folders of diffusers into a folder of weights: a whole pipeline, or one part of it."""

import shutil
from pathlib import Path

from uae_jax import storage
from uae_jax.convert import bundle, folder, lora, pooled, transfer
from uae_jax.errors import UserError
from uae_jax.sampling import scheduler

INDEX = "model_index.json"
PARTS = ("vae", "scheduler", "transformer")


def import_folder(source: Path, target: Path, adapter: Path | None = None) -> str:
    """Copies one model to the new folder `target`, or the parts of a pipeline into a folder of weights.

    Args:
      adapter: a LoRA of the transformer, in diffusers' format, that is merged into it.

    Returns:
      A line that says what was written.

    Raises:
      UserError: see `transfer.copy_model`; a part of the pipeline is missing or of another kind, or is already there.
    """
    if (source / INDEX).is_file():
        return _import_pipeline(source, target, adapter)
    if (source / scheduler.FILE).is_file():
        return copy_scheduler(source, target)
    if (source / "config.json").is_file() and folder.architecture(folder.load_config(source)) == bundle.CLASS_NAME:
        return bundle.import_bundle(source, target)
    return _copy_transformer(source, target, adapter) if adapter else transfer.copy_model(source, target)


def _copy_transformer(source: Path, target: Path, adapter: Path | None) -> str:
    """Copies a DiT, with its adapter merged."""
    if adapter is None:
        return transfer.copy_model(source, target)
    found = folder.open_model(source)
    if found.architecture not in pooled.TOWERS:
        raise UserError(f"--lora: {source} is a {found.architecture}, not one of {', '.join(pooled.TOWERS)}")
    leaves = lora.read_diffusers(adapter, found.table)
    rank = float(next(iter(leaves.values())).shape[-1])
    trained = transfer.Trained({path: x.shape for path, x in leaves.items()}, leaves.__getitem__, rank)
    return f"{transfer.copy_model(source, target, trained)}, with {adapter.name}"


def copy_scheduler(source: Path, target: Path) -> str:
    """Checks the scheduler of a folder and copies it to the new folder `target`; see `import_folder`."""
    scheduler.load(source)
    with storage.new_folder(target) as partial:
        shutil.copyfile(source / scheduler.FILE, partial / scheduler.FILE)
    return scheduler.CLASS_NAME


def _import_pipeline(source: Path, target: Path, adapter: Path | None) -> str:
    for name in PARTS:
        if not (source / name).is_dir():
            raise UserError(f"{source / name} is missing: this is not the pipeline of an SD3 or a FLUX.1")
        if (target / name).exists():
            raise UserError(f"{target / name} exists: choose another place, or remove it")
    kind = folder.architecture(folder.load_config(source / "transformer"))
    if kind not in pooled.TOWERS:
        raise UserError(f"{source / 'transformer'} is a {kind}, not one of {', '.join(pooled.TOWERS)}")
    # Everything is checked before anything is written.
    found = folder.open_model(source / "transformer")
    folder.open_model(source / "vae")
    scheduler.load(source / "scheduler")
    vector = pooled.of_empty_prompt(source, found.config, kind)
    done = [
        transfer.copy_model(source / "vae", target / "vae"),
        copy_scheduler(source / "scheduler", target / "scheduler"),
        # Last: with it the folder is complete.
        _copy_transformer(source / "transformer", target / "transformer", adapter),
    ]
    pooled.write(target / "transformer" / pooled.FILE, vector)
    return "; ".join(done) + f"; pooled vector of {len(vector)}"
