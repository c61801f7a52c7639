"""Benchmarks.

    python -m uae_jax.evaluate unified_bench --sources=DIR --reconstructions=DIR --towers=NAME=DIR,... --out=DIR
    python -m uae_jax.evaluate caption_duel --sources=DIR --captions=FILE --against=FILE \\
        --judge=NAME=URL,model=MODEL --out=DIR

unified_bench scores redrawn pictures, by any system, against their sources: clip, longclip, dinov2 and dinov3 are the
paper's towers. caption_duel asks vision-language judges, behind any OpenAI-compatible endpoint, which of two captions
of a picture is better; it prints what that will cost before it starts. Tables are printed, and written to --out with
JSON.
"""

import sys
from pathlib import Path

from absl import flags

from uae_jax import runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("sources", "", "folder of source pictures", flag_values=FLAGS)
flags.DEFINE_string("reconstructions", "", "folder of a system's redraws of them", flag_values=FLAGS)
flags.DEFINE_string("captions", "", 'a system\'s captions: lines {"file_name": ..., "text": ...}', flag_values=FLAGS)
flags.DEFINE_string("against", "", "a second system's redraws, or captions, for comparison", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "judge",
    [],
    "NAME=URL,model=MODEL[,key=ENVIRONMENT_VARIABLE][,price_in=X][,price_out=X]; may be repeated. The key is read from "
    "the environment (OPENAI_API_KEY); prices are dollars for a million tokens",
    flag_values=FLAGS,
)
flags.DEFINE_integer("concurrency", 4, "requests to judges at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("timeout", 120.0, "seconds that a judge may take", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_bool("dry_run", False, "estimate what judges will cost, and ask none", flag_values=FLAGS)
flags.DEFINE_list("towers", [], "NAME=DIR of each tower, separated by commas", flag_values=FLAGS)
flags.DEFINE_string("out", "", "where results go", flag_values=FLAGS)
flags.DEFINE_bool("compat", False, "as the official scorer: failures are left out of the mean", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "pictures at once", lower_bound=1, flag_values=FLAGS)

# Each with the flags that it needs.
BENCHMARKS = {
    "unified_bench": ("sources", "reconstructions", "towers", "out"),
    "caption_duel": ("sources", "captions", "against", "judge", "out"),
}


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
    for name in FLAGS:
        FLAGS[name].unparse()  # of an earlier call in this process
    try:
        rest = FLAGS(arguments)[1:]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        raise UserError(f"name one benchmark ({', '.join(BENCHMARKS)}), not {' '.join(rest) or 'none'}")
    benchmark = rest[0]
    for name in BENCHMARKS[benchmark]:
        if not FLAGS[name].value:
            raise UserError(f"{benchmark} needs --{name}")
    runtime.prepare()
    {"unified_bench": unified_bench, "caption_duel": caption_duel}[benchmark]()


def unified_bench() -> None:
    """Scores redrawn pictures."""
    from uae_jax.bench import unified_bench  # only now: jax reads its environment when it is imported

    result = unified_bench.run(
        Path(FLAGS.sources),
        Path(FLAGS.reconstructions),
        parse_towers(FLAGS.towers),
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


def caption_duel() -> None:
    """Lets judges compare two systems' captions."""
    from uae_jax.bench import caption_duel, judges

    result = caption_duel.run(
        Path(FLAGS.sources),
        Path(FLAGS.captions),
        Path(FLAGS.against),
        [judges.parse_judge(text) for text in FLAGS.judge],
        Path(FLAGS.out),
        judges.Limits(concurrency=FLAGS.concurrency, timeout=FLAGS.timeout),
        dry_run=FLAGS.dry_run,
    )
    if not FLAGS.dry_run:
        print(caption_duel.markdown(result), end="")


if __name__ == "__main__":
    runtime.run(main, sys.argv)
