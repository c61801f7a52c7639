"""Unified-GRPO on the tiny world, end to end, on a laptop.

python -m uae_jax.main --config=configs/tiny.py
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """Starts from the shipped weights; everything not named here is `uae_jax.config.default`."""
    config = base.default()
    config.steps = 300
    config.remat = False  # memory is no concern at this size
    config.redraw.steps = 2  # as good as 4 with this decoder, and twice as fast
    config.redraw.prediction = "sample"  # what the shipped decoder predicts
    config.rl.malformed = "group_min"  # a caption outside the grammar earns the least of its group
    return config
