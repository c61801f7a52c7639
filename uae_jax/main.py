"""Trains: `python -m uae_jax.main --config=configs/tiny.py [--workdir=DIR] [--config.FIELD=VALUE]`.

On several hosts the same command is started on each of them, with a --workdir that they share. SLURM, GKE and TPU VMs
say which process is which; elsewhere --coordinator_address, --num_processes and --process_id do.
"""

import re
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from uae_jax import config as configs
from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "", "where checkpoints and results go; runs/<config name> by default", flag_values=FLAGS)
flags.DEFINE_string(
    "coordinator_address", None, "several processes: host:port at which process 0 listens", flag_values=FLAGS
)
flags.DEFINE_integer("num_processes", None, "several processes: how many", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "process_id", None, "several processes: which one this is, from 0", lower_bound=0, flag_values=FLAGS
)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the config file; fields are changed by --config.FIELD=VALUE", lock_config=True, flag_values=FLAGS
)


def explicit_place() -> runtime.Place | None:
    """What the three flags of a process among several say, or None without them.

    Raises:
      UserError: one of them is missing or makes no sense.
    """
    values: dict[str, Any] = {name: FLAGS[name].value for name in runtime.Place._fields}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(values):
        return None
    if missing:
        raise UserError(f"--{missing[0]} is missing: a process among several needs --{', --'.join(values)}")
    place = runtime.Place(**values)
    if place.process_id >= place.num_processes:
        raise UserError(f"--process_id={place.process_id}: must be below --num_processes={place.num_processes}")
    if not re.fullmatch(r".+:\d+", place.coordinator_address):
        raise UserError(f"--coordinator_address={place.coordinator_address}: use host:port, of process 0")
    return place


def main(arguments: list[str]) -> None:
    """Parses the command line and trains."""
    config = runtime.parse(FLAGS, arguments)
    configs.validate(config)
    place = explicit_place()
    runtime.prepare()
    if "://" in FLAGS.workdir:
        raise UserError(f"--workdir={FLAGS.workdir}: files there grow: mount the bucket, and name its folder")
    workdir = Path(FLAGS.workdir or Path("runs") / Path(config_flags.get_config_filename(FLAGS["config"])).stem)
    with runtime.joined(place, config.heartbeat_seconds):
        from uae_jax import train  # only now: jax reads its environment when it is imported

        train.run(config, workdir)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
