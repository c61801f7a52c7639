"""Unified-GRPO on the tiny world, end to end, on a laptop.

python -m uae_jax.main --config=configs/tiny.py
python -m uae_jax.main --config=configs/tiny.py --config.data.source=folder --config.data.path=IMAGES --workdir=DIR

Hardware: two CPU cores. Time: one to three minutes of training, four in all the first time; compiled programs are kept.
Expected (three seeds, 2,048 held-out scenes each, most likely captions, paired 95% intervals; `python -m
benchmarks.learns` makes this table, and docs/learns/table.md has all of it, by category):

    |                                        | before |  after | change (95% interval)    |
    | reward (ceiling 0.971)                 |  0.203 |  0.970 | +0.768 (+0.758, +0.777)  |
    | second tower (ceiling 0.986)           |  0.236 |  0.986 | +0.750 (+0.741, +0.760)  |
    | recall of facts                        |  0.296 |  0.998 | +0.702 (+0.694, +0.709)  |
    | precision of facts                     |  0.841 |  0.998 | +0.157 (+0.152, +0.162)  |
    | recall, small objects                  |  0.221 |  0.997 | +0.777 (+0.767, +0.786)  |
    | malformed captions                     |  0.000 |  0.000 |  0                       |
    | forced-choice perception               |  0.997 |  0.999 | +0.002 (+0.001, +0.002)  |
    | judge on the redraws (ceiling 0.931)   |  0.252 |  0.926 | +0.674 (+0.666, +0.682)  |
    | caption length, tokens (complete 21.6) |  8.949 | 21.554 | +12.60 (+12.41, +12.82)  |
    | control: + true background             |  0.203 |  0.970 | the gain is not the background |
    | control: objects of another image      |  0.033 |  0.033 |                          |
    | control: background only               |  0.069 |  0.069 |                          |
    | control: shuffled captions             |  0.029 |  0.008 |                          |
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """Starts from the shipped weights; everything not named here is `uae_jax.config.default`."""
    config = base.default()
    config.steps = 200
    config.remat = "none"  # memory is no concern at this size
    config.redraw.steps = 2  # as good as 4 with this decoder, and twice as fast
    config.redraw.prediction = "sample"  # what the shipped decoder predicts
    config.eval.every = 10  # most happens in the first 50 steps
    config.optimizer = base.optimizer("adamw", 5e-5, warmup=10, decay=True)
    config.rl.malformed = "group_min"  # a caption outside the grammar earns the least of its group
    return config
