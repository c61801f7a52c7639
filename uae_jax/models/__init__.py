"""One folder an architecture: `model.py` (linen modules) and `weights.py` (the Hugging Face name table)."""

from typing import Any

import jax
from flax import linen as nn


def apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """Calls a module, or one of its methods, with a tree of parameters."""
    return module.apply({"params": params}, *args, method=method)


def initial(module: nn.Module, key: jax.Array, *args: Any) -> Any:
    """Random parameters of a module, compiled as one program (operation by operation takes minutes)."""
    return jax.jit(module.init)(key, *args)["params"]


def rematerialised(block: type[nn.Module], remat: bool) -> type[nn.Module]:
    """A block that is to be scanned over; with `remat` its activations are recomputed in the backward pass."""
    # A scan already keeps XLA from merging the two forward passes.
    return nn.remat(block, prevent_cse=False) if remat else block
