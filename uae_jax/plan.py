"""Does a config fit a machine, and how fast could it be: compiled for a TPU with no TPU.

    python -m uae_jax.plan --config=FILE --topology=v5p:4x4x8 [--slices=2] [--json FILE] [--price_per_chip_hour=2.5]
    python -m uae_jax.plan --config=FILE --topology=v5p:8x8x16 --parts=
    python -m uae_jax.plan --config=FILE --topology=v5e:4x4 --sweep
    python -m uae_jax.plan --config=FILE --topology=h100:8

Prints memory on a chip, FLOPs, collectives by loop depth, and a roofline of each phase (sample, redraw, score, update);
what the compiler measured and what is estimated is said with them. TPUs need the compiler (pip install 'uae_jax[tpu]').
No weights are read: sizes come from config.models, else from the config.json files of config.weights. Exit code 3:
it does not fit.
"""

import os
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from uae_jax import config as configs
from uae_jax import runtime, storage
from uae_jax.errors import UserError
from uae_jax.planning import topology as topologies

PARTS = ("sample", "redraw", "score", "update")

FLAGS = flags.FlagValues()
flags.DEFINE_string("topology", None, "the machine: v5e:4x4, v5p:4x4x8, v6e:16x16, h100:8, cpu:8", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "how many of them, joined by the data center's network", flag_values=FLAGS)
flags.DEFINE_string("json", "", "file to write the plan to", flag_values=FLAGS)
flags.DEFINE_float("price_per_chip_hour", 0.0, "for the cost of 1,000 images, in its own currency", flag_values=FLAGS)
flags.DEFINE_list("parts", list(PARTS), "which to compile; --parts= none: by arithmetic alone", flag_values=FLAGS)
flags.DEFINE_boolean("whole", False, "compile the step as one program, too, as runs do", flag_values=FLAGS)
flags.DEFINE_boolean("sweep", False, "try meshes and microbatches, compile the best three", flag_values=FLAGS)
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "the config file; fields are changed by --config.FIELD=VALUE", lock_config=True, flag_values=FLAGS
)

DOES_NOT_FIT = 3
SHOWN_CANDIDATES = 12


def main(arguments: list[str]) -> None:
    """Parses the command line, plans and prints; exits with 3 if it does not fit."""
    config = runtime.parse(FLAGS, arguments)
    configs.validate(config)
    if not FLAGS.topology:
        raise UserError("no machine: name one by --topology, for example --topology=v5e:4x4")
    topology = topologies.parse(FLAGS.topology, FLAGS.slices)
    if unknown := sorted(set(FLAGS.parts) - set(PARTS)):
        raise UserError(f"--parts={unknown[0]}: use some of {','.join(PARTS)}")
    if FLAGS.price_per_chip_hour < 0:
        raise UserError(f"--price_per_chip_hour={FLAGS.price_per_chip_hour}: must not be negative")
    runtime.prepare()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from the cache says nothing about itself
    topologies.prepare(topology)
    from uae_jax.planning import report, search  # only now: jax reads its environment when it is imported

    name = Path(config_flags.get_config_filename(FLAGS["config"])).stem
    options = search.Options(name, tuple(FLAGS.parts), FLAGS.whole, FLAGS.price_per_chip_hour)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    others = []
    if FLAGS.sweep:
        tried = search.sweep(config, topology, options, say)
        found = tried[0].plan
        print(report.columns(report.ranking(tried, SHOWN_CANDIDATES)), end="\n\n")
        others = [candidate.changes | report.as_json(candidate.plan) for candidate in tried]
    else:
        found = search.plan(config, topology, options, say)
    print(report.as_text(found))
    if FLAGS.json:
        values = report.as_json(found) | ({"sweep": others} if others else {})
        storage.write_atomic(Path(FLAGS.json), report.dump(values))
    if not found.fits:
        raise SystemExit(DOES_NOT_FIT)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
