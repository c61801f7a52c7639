"""Trains: `python -m uae_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.FIELD=VALUE]`."""

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from uae_jax import config as configs
from uae_jax import runtime

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "where checkpoints and results go; runs/<config name> by default", flag_values=FLAGS)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the config file; fields are changed by --config.FIELD=VALUE", lock_config=True, flag_values=FLAGS
)


def main(arguments: list[str]) -> None:
    """Parses the command line and trains."""
    config = runtime.parse(FLAGS, arguments)
    configs.validate(config)
    runtime.refuse_many_processes()
    runtime.prepare()
    from uae_jax import train  # only now: jax reads its environment when it is imported

    workdir = Path(FLAGS.workdir or Path("runs") / Path(config_flags.get_config_filename(FLAGS["config"])).stem)
    train.run(config, workdir)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
