"""Unified-GRPO on the tiny world with one autoregressive model that captions and draws, on a laptop.

python -m uae_jax.main --config=configs/tiny_ar.py

Hardware: two CPU cores.
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """Starts from the shipped weights; everything not named here is `uae_jax.config.default`."""
    config = base.default()
    config.weights = "tiny_ar"
    config.towers = "tiny"  # both worlds are measured alike
    config.prompt.redraw_suffix = "<|vision_start|>"  # begins an image
    config.steps = 200
    config.remat = "none"  # memory is no concern at this size
    config.train = "both"  # words and image tokens are actions of one policy
    config.text_encoder = "live"
    config.redraw.same_noise = False
    config.redraw.temperature = 0.5  # at 1 a wrong code or two spoil one picture in ten: ceiling .89 instead of .94
    config.eval.every = 10  # most happens in the first 50 steps
    config.optimizer = base.optimizer("adamw", 5e-5, warmup=10, decay=True)
    config.rl.malformed = "group_min"  # a caption outside the grammar earns the least of its group
    return config
