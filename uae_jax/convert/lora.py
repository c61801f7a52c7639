"""Low-rank adapters (LoRA, Hu et al. 2021): out, merged, as a PEFT folder or as diffusers saves them; in, as those.

An adapter lies beside its kernel [..., in, out] as `lora_a` [..., in, r] and `lora_b` [..., r, out]; leading axes stack
layers. The kernel it stands for is kernel + (alpha / r) lora_a @ lora_b.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from uae_jax.convert import files
from uae_jax.convert import table as tables
from uae_jax.errors import UserError

LEAVES = ("lora_a", "lora_b")
DIFFUSERS_STEM = "pytorch_lora_weights"
_NOTE = "lora_adapter_metadata"  # under which diffusers notes the adapters' settings in a file


def paths(kernel: str) -> list[str]:
    """'.../q_proj/kernel' -> the paths of its adapter."""
    parent = kernel.rpartition("/")[0]
    return [f"{parent}/{leaf}" for leaf in LEAVES]


def shapes(kernel: tuple[int, ...], rank: int) -> list[tuple[int, ...]]:
    """Shapes of a rank-r adapter of a kernel [..., in, out]."""
    return [(*kernel[:-1], rank), (*kernel[:-2], rank, kernel[-1])]


def merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, alpha: float) -> np.ndarray:
    """kernel [..., in, out] + (alpha / r) a [..., in, r] @ b [..., r, out], in float32."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.asarray(kernel, np.float32) + np.float32(alpha / a.shape[-1]) * (a @ b)


def write_adapter(
    folder: Path,
    table: list[tables.Entry],
    adapters: Collection[str],
    read: Callable[[str], np.ndarray],
    alpha: float,
    base: str,
    module_name: Callable[[str], str],
) -> int:
    """Writes adapter_model.safetensors and adapter_config.json, in PEFT's names and layout.

    Args:
      folder: exists, and is empty.
      table: of the model.
      adapters: the '/'-joined paths of all leaves, of one rank.
      read: gives a leaf by its path.
      alpha: a product of adapters counts alpha / r.
      base: folder of the model that the adapters belong to.
      module_name: name of a tensor in the file -> in the class that loads it.

    Returns:
      How many linear layers have an adapter.

    Raises:
      UserError: adapters of layers that are one matrix there.
    """
    found: Pairs = {}
    for name, (a, b) in _torch_pairs(table, adapters, read).items():
        if a.ndim != 2:
            raise UserError(
                f"--adapter: {module_name(name)} is one layer in {base}, with adapters of its parts: merge them"
            )
        found[module_name(name)] = a, b
    _write_pairs(folder, found, "base_model.model.", "adapter_model")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank_of(found),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(found),  # in full: the vision tower has layers of the same names
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(found)


def write_diffusers(
    folder: Path,
    table: list[tables.Entry],
    adapters: Collection[str],
    read: Callable[[str], np.ndarray],
    alpha: float,
) -> int:
    """Writes the adapters of a DiT as `load_lora_weights` of its pipeline, and `read_diffusers`, read them.

    alpha / r is multiplied into lora_B, and the alpha that is noted is r: so a reader without the note is right too.

    Arguments and result are those of `write_adapter`.

    Raises:
      UserError: an adapter is of a kernel that is no linear layer there (the patch embedding).
    """
    kernels = [e for e in table if e.path.endswith("/kernel") and paths(e.path)[0] in adapters]
    others = [e.path for e in kernels if e.transform is not tables.LINEAR]
    if others:
        raise UserError(
            f"--adapter: {', '.join(others)}: no linear layer in diffusers: export merged, without --adapter"
        )
    found = {name: (a, b * np.float32(alpha / len(a))) for name, (a, b) in _torch_pairs(table, adapters, read).items()}
    rank = rank_of(found)
    note = {"r": rank, "lora_alpha": rank, "target_modules": list(found)}
    note = {f"transformer.{name}": value for name, value in note.items()}
    _write_pairs(folder, found, "transformer.", DIFFUSERS_STEM, {_NOTE: json.dumps(note)})
    return len(found)


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # by module: lora_A [r, in] and lora_B [out, r], as torch has them


def rank_of(pairs: Pairs) -> int:
    """The rank that all have."""
    return next(iter(pairs.values()))[0].shape[0]


def _torch_pairs(table: list[tables.Entry], adapters: Collection[str], read: Callable[[str], np.ndarray]) -> Pairs:
    pairs: Pairs = {}
    for entry in table:
        names = paths(entry.path)
        if entry.path.endswith("/kernel") and names[0] in adapters:
            a, b = (np.asarray(read(name), np.float32) for name in names)
            for index, name in tables.indexed(entry.names):
                pairs[name.removesuffix(".weight")] = a[index].T, b[index].T
    return pairs


def _write_pairs(folder: Path, pairs: Pairs, prefix: str, stem: str, metadata: Mapping[str, str] | None = None) -> None:
    tensors = {
        f"{prefix}{module}.{part}.weight": x
        for module, pair in pairs.items()
        for part, x in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    specs = {name: files.Spec(x.dtype, x.shape) for name, x in tensors.items()}
    files.write(folder, specs, tensors.items(), stem, sum(spec.nbytes for spec in specs.values()), metadata)


def read_diffusers(path: Path, table: list[tables.Entry]) -> dict[str, np.ndarray]:
    """The adapters of a DiT in a file as diffusers' `save_lora_weights` writes it, for `merge` with alpha = their rank.

    A layer without an adapter gets zeros where others of its stack have one, a smaller rank is filled up with zeros,
    and every layer's alpha / r is multiplied into its `lora_b`: the products are those of the file.

    Args:
      path: of pytorch_lora_weights.safetensors.
      table: of the transformer.

    Returns:
      {'.../lora_a': float32 [..., in, r], '.../lora_b': [..., r, out]}.

    Raises:
      UserError: names what in the file is no adapter of a linear layer of the transformer.
    """
    headers = files.read_header(path)
    views = files.map_tensors(headers)
    found = {name.removeprefix("transformer."): np.asarray(x, np.float32) for name, x in views.items()}
    if not found:
        raise UserError(f"{path} holds no adapters")
    rank = max((x.shape[0] for name, x in found.items() if name.endswith(".lora_A.weight")), default=1)
    alphas = _alphas(path)
    adapters: dict[str, np.ndarray] = {}
    for entry in table:
        if entry.transform is not tables.LINEAR:
            continue
        leaves = [np.zeros(shape, np.float32) for shape in shapes(tables.param_shape(entry), rank)]
        for index, name in tables.indexed(entry.names):
            module = name.removesuffix(".weight")
            pair = [found.pop(f"{module}.{part}.weight", None) for part in ("lora_A", "lora_B")]
            if pair[0] is None and pair[1] is None:
                continue
            if pair[0] is None or pair[1] is None:
                raise UserError(f"{path}: the adapter of {module} has only one of lora_A and lora_B")
            (r, inputs), (outputs, again) = pair[0].shape, pair[1].shape
            if (outputs, inputs) != entry.shape or r != again:
                raise UserError(f"{path}: the adapter of {module} is {outputs}x{inputs}, the layer {entry.shape}")
            stored = found.pop(f"{module}.alpha", None)
            alpha = alphas.get(module, alphas.get("", r)) if stored is None else float(stored)
            leaves[0][index][..., :r] = pair[0].T
            leaves[1][index][:r] = pair[1].T * (alpha / r)
            adapters |= zip(paths(entry.path), leaves, strict=True)
    if found:
        raise UserError(f"{path} does not fit the transformer: unexpected {', '.join(sorted(found)[:5])}")
    return adapters


def _alphas(path: Path) -> dict[str, float]:
    """Alphas by module, '' for all others, that diffusers notes in the file's metadata."""
    with safe_open(path, framework="numpy") as file:
        note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
    note = {name.removeprefix("transformer."): value for name, value in note.items()}
    if note.get("use_rslora") or note.get("use_dora"):
        raise UserError(f"{path}: rsLoRA and DoRA are not supported")
    found = dict(note.get("alpha_pattern") or {})
    if note.get("lora_alpha") is not None:
        found[""] = note["lora_alpha"]
    return found
