"""Low-rank adapters (LoRA, Hu et al. 2021) on their way out: merged into kernels, or as a PEFT adapter folder.

An adapter lies beside its kernel [..., in, out] as `lora_a` [..., in, r] and `lora_b` [..., r, out]; leading axes stack
layers. The kernel it stands for is kernel + (alpha / r) lora_a @ lora_b.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from uae_jax.convert import files
from uae_jax.convert import table as tables
from uae_jax.models.qwen2_5_vl.weights import module_name

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
) -> int:
    """Writes adapter_model.safetensors and adapter_config.json, in PEFT's names and layout.

    Args:
      folder: exists, and is empty.
      table: of the model.
      adapters: the '/'-joined paths of all leaves, of one rank.
      read: gives a leaf by its path.
      alpha: a product of adapters counts alpha / r.
      base: folder of the model that the adapters belong to.

    Returns:
      How many linear layers have an adapter.
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
