"""Optimizers from `config.optimizer`-like fields."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from uae_jax.sharding import Rules, Split
from uae_jax.umm import Params

# An optimizer's state has the shapes and the paths of the parameters, behind its own, and takes their sharding rules.
# What else it holds:
RULES: Rules = ((r".*/ns_coeffs", Split.COPIED),)


def schedule(config: Any, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero at `steps`."""
    rate = config.learning_rate
    after = optax.constant_schedule(rate)
    if config.decay:
        after = optax.cosine_decay_schedule(rate, max(steps - config.warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, rate, max(config.warmup, 1)), after], [config.warmup])


def matrices(params: Params) -> Params:
    """Which leaves Muon orthogonalises: kernels of linear layers and their adapters; the rest gets Adam."""

    def dimensions(path: Any, leaf: jax.Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("kernel", "lora_a", "lora_b")) and "conv" not in name:
            return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
        return None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make(config: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW, or Muon for matrices with Adam at a tenth of the rate for the rest; gradients clipped by global norm."""
    if config.name == "muon":
        inner = optax.contrib.muon(
            rate,
            adam_learning_rate=lambda count: 0.1 * rate(count),
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        inner = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), inner)
