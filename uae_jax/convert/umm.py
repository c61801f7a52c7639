"""A whole unified model out: what captions, what reads captions, what draws, and a page of PyTorch that runs them."""

import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

from uae_jax import storage, system
from uae_jax.convert import folder, pipeline, pooled, transfer
from uae_jax.errors import UserError
from uae_jax.sampling import scheduler

PAGE = "run.py"
SETTINGS = "umm.json"

_CARD = """# {captioner} and {transformer}, tuned to understand each other

Exported by uae_jax from {origin}. An image is captioned by `encoder/`, and redrawn from the caption's text alone.

| folder | what |
|---|---|
| `encoder/` | writes captions (transformers) |
| `{reader}/` | reads a caption as text; its last hidden states go through the projector |
| `projector/` | one safetensors file with the names of an `nn.Sequential`: `0` Linear, {activation}, `2` Linear |
| `decoder/` | diffusers' `transformer/` (with `pooled.safetensors`, its pooled condition), `vae/`, `scheduler/` |
| `umm.json` | prompts and sampling settings |
| `run.py` | all of it in PyTorch |

{text}

    pip install torch transformers diffusers pillow
    python run.py PICTURE [OUT.png]

Padding is {padding} from the decoder (`mask_text`). Sampling: {steps} Euler steps, guidance {guidance}.
The licences of the models that this one was made from apply.
"""


def export(config: Any, target: Path, trained: transfer.Trained, origin: str) -> str:
    """Writes the system of `config.weights`, its captioner as trained, to the new folder `target`.

    With a frozen text encoder the captioner's starting weights are written too, as text_encoder/: they, and not those
    that were trained, are what the decoder listens to.

    Args:
      config: of a run.
      trained: of the captioner; `transfer.NOTHING` where nothing is.
      origin: what is exported, in words, for the card.

    Returns:
      A line that says what was written.

    Raises:
      UserError: a part is missing, or is one that the page cannot run (of the tiny world).
    """
    where = system.weights_folder(config)
    if system.captioner_folder(config).name == system.JANUS:
        raise UserError("--umm: this is one model already, which transformers runs: export it without --umm")
    projector = folder.open_model(where / "projector").config
    kinds = {name: folder.architecture(folder.load_config(where / name)) for name in ("captioner", "transformer")}
    refused = {
        "a decoder without vae/": not (where / "vae").is_dir(),
        "a projector that whitens": projector.whiten,
        "config.redraw.prediction = 'sample'": config.redraw.prediction != "velocity",
        "config.condition_source = 'in_context'": config.condition_source != "text",
    }
    found = [name for name, wrong in refused.items() if wrong]
    if found:
        raise UserError(
            f"--umm: {', '.join(found)}: only a system of published parts is exported with a page to run it"
        )
    frozen = config.text_encoder == "frozen" and bool(trained.shapes)
    reader = "text_encoder" if frozen else "encoder"
    settings = {
        "transformer": kinds["transformer"],
        "activation": projector.activation,
        "text_encoder": reader,
        "image_size": config.data.image_size,
        "mask_text": config.mask_text,
        "max_tokens": config.rl.max_tokens,
        "prompt": config.prompt.to_dict(),
        "redraw": {name: config.redraw[name] for name in ("steps", "guidance", "distilled_guidance", "spacing")},
    }
    with storage.new_folder(target) as partial:
        transfer.copy_model(where / "captioner", partial / "encoder", trained)
        if frozen:
            transfer.copy_model(where / "captioner", partial / "text_encoder")
        transfer.copy_model(where / "projector", partial / "projector")
        for name in ("transformer", "vae"):
            transfer.copy_model(where / name, partial / "decoder" / name)
        if (where / "scheduler").is_dir():
            pipeline.copy_scheduler(where / "scheduler", partial / "decoder" / "scheduler")
        else:
            scheduler.save(partial / "decoder" / "scheduler", scheduler.Scheduler(shift=config.redraw.shift))
        if not (partial / "decoder" / "transformer" / pooled.FILE).is_file():
            raise UserError(f"{where / 'transformer' / pooled.FILE} is missing: import the whole pipeline")
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        page = Path(str(importlib.resources.files("uae_jax"))) / "convert" / "umm_page.py"
        shutil.copyfile(page, partial / PAGE)
        text = (
            "`text_encoder/` holds the captioner's weights before training: training changed how captions are written, "
            "not how they are read, so text to image is what it was."
            if frozen
            else "The same weights write captions and read them."
        )
        card = _CARD.format(
            captioner=kinds["captioner"],
            transformer=kinds["transformer"],
            origin=origin,
            reader=reader,
            activation=projector.activation.upper(),
            text=text,
            padding="hidden" if config.mask_text else "not hidden",
            steps=config.redraw.steps,
            guidance=config.redraw.guidance,
        )
        (partial / "README.md").write_text(card)
    return f"encoder, {'text encoder, ' if frozen else ''}projector and decoder of {origin}"
