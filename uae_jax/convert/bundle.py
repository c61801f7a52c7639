"""UniWorld-V1's checkpoint into a folder of weights: captioner, projector and MM-DiT in one set of safetensors.

The names are those of its published classes (`UnivaQwen2p5VLForConditionalGeneration`, `UnivaDenoiseTower`):

    visual.*, model.*, lm_head.*           Qwen2.5-VL
    denoise_tower.denoiser.*               diffusers' FLUX (or SD3), config.json's denoise_tower.denoiser_config
    denoise_tower.denoise_projector.*      the projector (Linear, SiLU, Linear)
    denoise_tower.siglip_projector.*       and vae_projector.*: of pictures to edit; left out
"""

import json
import shutil
from pathlib import Path
from typing import Any

from uae_jax import storage
from uae_jax.convert import files, folder, pooled, transfer
from uae_jax.convert import table as tables
from uae_jax.errors import UserError
from uae_jax.models.flux import config as flux_config
from uae_jax.models.projector import model as projector
from uae_jax.models.sd3 import config as sd3_config

CLASS_NAME = "UnivaQwen2p5VLForConditionalGeneration"
_TOWER = "denoise_tower."
_PREFIXES = {f"{_TOWER}denoiser.": "transformer", f"{_TOWER}denoise_projector.": "projector"}
_LEFT_OUT = (f"{_TOWER}siglip_projector.", f"{_TOWER}vae_projector.")
_KINDS = {"flux": flux_config.CLASS_NAME, "sd3": sd3_config.CLASS_NAME}
_CAPTIONER = "Qwen2_5_VLForConditionalGeneration"


def configs(raw: dict[str, Any], where: Path) -> dict[str, dict[str, Any]]:
    """The config.json of each part.

    Raises:
      UserError: the bundle's does not describe its decoder.
    """
    tower = raw.get("denoise_tower")
    if not isinstance(tower, dict) or not isinstance(tower.get("denoiser_config"), dict):
        raise UserError(
            f"{where}/config.json: denoise_tower.denoiser_config is missing: it says what FLUX has been built"
        )
    if tower.get("denoiser_type", "flux") not in _KINDS or tower.get("denoise_projector_type") != "mlp2x_gelu":
        raise UserError(
            f"{where}/config.json: a denoiser_type of {tower.get('denoiser_type')!r} with a denoise_projector_type of "
            f"{tower.get('denoise_projector_type')!r} is not known; flux or sd3 with mlp2x_gelu is"
        )
    width = tower.get("output_hidden_size", 4096)
    hidden = int((raw.get("text_config") or raw).get("hidden_size") or tower.get("input_hidden_size", 0))
    captioner = {name: value for name, value in raw.items() if name != "denoise_tower"}
    return {
        # Its class calls itself mlp2x_gelu, and is built with a SiLU.
        "projector": projector.Config(hidden, 3 * width, width, activation="silu").to_hf(),
        "transformer": tower["denoiser_config"] | {"_class_name": _KINDS[tower.get("denoiser_type", "flux")]},
        "captioner": captioner | {"architectures": [_CAPTIONER], "model_type": "qwen2_5_vl"},
    }


def import_bundle(source: Path, target: Path) -> str:
    """Splits the bundle `source` into `target`/captioner, projector and transformer.

    `target` should hold the import of its host's pipeline (FLUX.1-dev): vae, scheduler and the pooled vector are not in
    the bundle, whose transformer takes the place of the host's.

    Returns:
      A line that says what was written.

    Raises:
      UserError: tensors are missing, left over or of a wrong shape, or a part other than the transformer is there.
    """
    _, headers, problems = files.read_headers(source)
    parts: dict[str, dict[str, files.Header]] = {"captioner": {}, "projector": {}, "transformer": {}}
    left_out = 0
    for name, header in headers.items():
        if name.startswith(_LEFT_OUT):
            left_out += 1
            continue
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        parts[_PREFIXES.get(prefix, "captioner")][name.removeprefix(prefix)] = header
    raw = configs(folder.load_config(source), source)
    for part, found in parts.items():
        known = folder.ARCHITECTURES[folder.architecture(raw[part])]
        config = known.config.from_hf(raw[part])
        ties = known.ties(config)
        shapes = {known.canonical(name): header.shape for name, header in found.items() if name not in ties}
        problems += [f"{part}: {problem}" for problem in tables.mismatches(known.table(config), shapes)]
    tables.refuse(problems, str(source))
    for part in ("captioner", "projector"):
        if (target / part).exists():
            raise UserError(f"{target / part} exists: choose another place, or remove it")
    vector = target / "transformer" / pooled.FILE
    done = []
    for part, found in parts.items():
        # The transformer of the host, which is there, stands until that of the bundle is complete.
        with storage.new_folder(target / (f".{part}" if part == "transformer" else part)) as partial:
            views = files.map_tensors(found)
            specs = {name: files.Spec(x.dtype, x.shape) for name, x in views.items()}
            files.write(partial, specs, views.items(), files.STEMS[part == "transformer"])
            if part == "captioner":
                transfer.copy_companions(source, partial)
            elif part == "transformer" and vector.is_file():
                shutil.copyfile(vector, partial / pooled.FILE)
            (partial / "config.json").write_text(json.dumps(raw[part], indent=2) + "\n")
        done.append(f"{part} of {len(found)} tensors")
    if (target / "transformer").exists():
        shutil.rmtree(target / "transformer")
    (target / ".transformer").rename(target / "transformer")
    note = f"; {left_out} tensors of its editing streams left out" if left_out else ""
    return ", ".join(done) + note
