"""Low-rank adapters (LoRA, Hu et al. 2021): out, merged into kernels or as a PEFT folder; in, as diffusers saves them.

An adapter lies beside its kernel [..., in, out] as `lora_a` [..., in, r] and `lora_b` [..., r, out]; leading axes stack
layers. The kernel it stands for is kernel + (alpha / r) lora_a @ lora_b.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from safetensors import safe_open

from uae_jax.convert import files
from uae_jax.convert import table as tables
from uae_jax.errors import UserError

LEAVES = ("lora_a", "lora_b")


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
    tensors: dict[str, np.ndarray] = {}
    modules = []
    for entry in table:
        names = paths(entry.path)
        if not entry.path.endswith("/kernel") or names[0] not in adapters:
            continue
        a, b = (np.asarray(read(name), np.float32) for name in names)
        for index, name in tables.indexed(entry.names):
            module = module_name(name).removesuffix(".weight")
            if a[index].ndim != 2:
                raise UserError(f"--adapter: {module} is one layer in {base}, with adapters of its parts: merge them")
            modules.append(module)
            # torch's linear layers are [out, in]
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[index].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[index].T
    specs = {name: files.Spec(x.dtype, x.shape) for name, x in tensors.items()}
    files.write(folder, specs, tensors.items(), stem="adapter_model", shard_bytes=sum(s.nbytes for s in specs.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": a.shape[-1],
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,  # in full: the vision tower has layers of the same names
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return len(modules)


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
        note = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    note = {name.removeprefix("transformer."): value for name, value in note.items()}
    if note.get("use_rslora") or note.get("use_dora"):
        raise UserError(f"{path}: rsLoRA and DoRA are not supported")
    found = dict(note.get("alpha_pattern") or {})
    if note.get("lora_alpha") is not None:
        found[""] = note["lora_alpha"]
    return found
