"""Low-rank adapters (LoRA): a kernel [..., in, out] becomes kernel + (alpha / r) a @ b, of which a and b are trained.

Adapters are a tree of their own: for a kernel at `.../q_proj/kernel`, `.../q_proj/lora_a` [..., in, r] and
`.../q_proj/lora_b` [..., r, out], with the kernel's leading axes (layers that are scanned). Laid over the frozen
weights they make the trained model; without them the same weights are the reference policy and the text encoder.
`models.dense.Dense` applies them as x @ kernel + (x @ a) @ b: no merged kernel ever exists, and sampler and scorer
compute the same.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from uae_jax.errors import UserError

Params = dict[str, Any]


def initial(params: Params, rank: int, target: str, key: jax.Array) -> Params:
    """Adapters in float32 that change nothing yet: `lora_a` is uniform in +-1/sqrt(in) (as in PEFT), `lora_b` zero.

    Args:
      params: of the frozen model.
      target: regex over '/'-joined paths, from the start; the kernels it matches get an adapter.

    Raises:
      UserError: no kernel matches.
    """
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    kernels = sorted(path for path in shapes if path.endswith("/kernel"))
    chosen = [path for path in kernels if re.match(target, path)]
    if not chosen:
        raise UserError(f"lora.target = {target!r} matches no kernel; their paths look like {kernels[0]}")
    adapters: Params = {}
    for i, path in enumerate(chosen):
        *layers, inputs, outputs = shapes[path]
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), (*layers, inputs, rank), minval=-bound, maxval=bound)
        parent = path.removesuffix("kernel")
        adapters |= {f"{parent}lora_a": a, f"{parent}lora_b": jnp.zeros((*layers, rank, outputs))}
    return traverse_util.unflatten_dict(adapters, sep="/")


def scaled(params: Params, alpha: float) -> Params:
    """`params` with every `lora_a` times alpha / r, as the layers expect it; other leaves are left alone."""
    return {
        name: scaled(x, alpha) if isinstance(x, dict) else x * (alpha / x.shape[-1]) if name == "lora_a" else x
        for name, x in params.items()
    }
