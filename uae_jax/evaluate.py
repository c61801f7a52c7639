"""Benchmarks.

    python -m uae_jax.evaluate unified_bench --sources=DIR --reconstructions=DIR --towers=NAME=DIR,... --out=DIR

unified_bench scores redrawn pictures, by any system, against their sources: clip, longclip, dinov2 and dinov3 are the
paper's towers. Prints a table and writes unified_bench.json, .csv and .md to --out.
"""

import sys
from pathlib import Path

from absl import flags

from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("sources", "", "folder of source pictures", flag_values=FLAGS)
flags.DEFINE_string("reconstructions", "", "folder of a system's redraws of them", flag_values=FLAGS)
flags.DEFINE_string("against", "", "folder of a second system's redraws, compared image by image", flag_values=FLAGS)
flags.DEFINE_list("towers", [], "NAME=DIR of each tower, separated by commas", flag_values=FLAGS)
flags.DEFINE_string("out", "", "where results go", flag_values=FLAGS)
flags.DEFINE_bool("compat", False, "as the official scorer: failures are left out of the mean", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "pictures at once", lower_bound=1, flag_values=FLAGS)

BENCHMARKS = ("unified_bench",)


def parse_towers(values: list[str]) -> dict[str, Path]:
    """["clip=DIR", ...] -> {"clip": DIR}.

    Raises:
      UserError: one is not NAME=DIR, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, where = value.partition("=")
        if not (name and equals and where):
            raise UserError(f"--towers: {value!r} is not NAME=DIR, as clip=weights/clip")
        if name in found:
            raise UserError(f"--towers names {name!r} twice")
        found[name] = Path(where)
    return found


def main(arguments: list[str]) -> None:
    """Parses the command line and runs a benchmark."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, "\n", FLAGS.get_help(), sep="")
        return
    try:
        rest = FLAGS(arguments)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        raise UserError(f"name one benchmark ({', '.join(BENCHMARKS)}), not {' '.join(rest) or 'none'}")
    towers = parse_towers(FLAGS.towers)
    for name in ("sources", "reconstructions", "towers", "out"):
        if not FLAGS[name].value:
            raise UserError(f"unified_bench needs --{name}")
    runtime.prepare()
    from uae_jax.bench import unified_bench  # only now: jax reads its environment when it is imported

    result = unified_bench.run(
        Path(FLAGS.sources),
        Path(FLAGS.reconstructions),
        towers,
        Path(FLAGS.out),
        against=Path(FLAGS.against) if FLAGS.against else None,
        compat=FLAGS.compat,
        batch_size=FLAGS.batch_size,
    )
    print(unified_bench.markdown(result), end="")
    for entry in result["missing"]:
        print(f"failed: {entry['source']}: {entry['reason']}", file=sys.stderr)
    for path, reason in result["bad_sources"].items():
        print(f"not scored: source {path}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
