"""One folder an architecture: `model.py` (linen modules) and `weights.py` (the Hugging Face name table)."""

from typing import Any

import jax
from flax import linen as nn

# What the forward pass keeps of a block for the backward pass, by name: `none` keeps everything and computes nothing
# again, `full` keeps a block's inputs alone, `dots` also the products with weights (most of the work, not attention's).
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def apply(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """Calls a module, or one of its methods, with a tree of parameters."""
    return module.apply({"params": params}, *args, method=method)


def initial(module: nn.Module, key: jax.Array, *args: Any) -> Any:
    """Random parameters of a module, compiled as one program (operation by operation takes minutes)."""
    return jax.jit(module.init)(key, *args)["params"]


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
    """A block that is to be scanned over, whose activations the backward pass computes again as `REMAT[remat]` says."""
    if remat == "none":
        return block
    # A scan already keeps XLA from merging the two forward passes.
    return nn.remat(block, prevent_cse=False, policy=REMAT[remat])
