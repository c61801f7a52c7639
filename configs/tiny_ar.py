"""Unified-GRPO on the tiny world with one autoregressive model that captions and draws, on a laptop.

python -m uae_jax.main --config=configs/tiny_ar.py

Hardware: two CPU cores. Time: seven and a half minutes of training on cores that also did other work.
Expected (seed 21, 2,048 held-out scenes, most likely captions, paired 95% intervals; `python -m benchmarks.learns
--file=configs/tiny_ar.py` makes this table, and docs/learns_ar/table.md has all of it, by category):

    |                                        | before |  after | change (95% interval)    |
    | reward (ceiling 0.937)                 |  0.225 |  0.934 | +0.709 (+0.691, +0.726)  |
    | second tower (ceiling 0.968)           |  0.264 |  0.966 | +0.702 (+0.685, +0.719)  |
    | recall of facts                        |  0.333 |  0.997 | +0.665 (+0.649, +0.679)  |
    | precision of facts                     |  0.861 |  0.996 | +0.136 (+0.127, +0.144)  |
    | malformed captions                     |  0.000 |  0.000 |  0                       |
    | forced-choice perception               |  0.994 |  0.998 | +0.005 (+0.004, +0.006)  |
    | judge on the redraws (ceiling 0.925)   |  0.258 |  0.920 | +0.662 (+0.647, +0.676)  |
    | caption length, tokens (complete 21.4) |  9.564 | 21.442 | +11.88 (+11.50, +12.24)  |
    | control: + true background             |  0.225 |  0.934 | the gain is not the background |
    | control: objects of another image      |  0.046 |  0.046 |                          |
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
