"""Benchmarks.

    python -m uae_jax.evaluate unified_bench --sources=DIR --reconstructions=DIR --towers=NAME=DIR,... --out=DIR
    python -m uae_jax.evaluate unified_bench --sources=DIR --workdir=RUN --towers=NAME=DIR,... --out=DIR
    python -m uae_jax.evaluate unified_bench --sources=DIR --config=FILE --weights=DIR --captions=FILE ...
    python -m uae_jax.evaluate caption_duel --sources=DIR --captions=FILE --against=FILE \\
        --judge=NAME=URL,model=MODEL --out=DIR

unified_bench scores redrawn pictures against their sources: clip, longclip, dinov2 and dinov3 are the paper's towers.
The pictures are any system's (--reconstructions), or are drawn here by the model of a run (--workdir) or of a folder of
weights (--config, --weights), from its own captions or from any captioner's (--captions), with controls: shuffled
captions, no caption, and captions of one length. caption_duel asks vision-language judges, behind any
OpenAI-compatible endpoint, which of two captions of a picture is better; it prints what that will cost before it
starts. Tables are printed, and written to --out with JSON.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from uae_jax import config as configs
from uae_jax import reconstruct, runtime
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("sources", "", "folder of source pictures", flag_values=FLAGS)
flags.DEFINE_string("reconstructions", "", "folder of a system's redraws of them", flag_values=FLAGS)
flags.DEFINE_string("workdir", "", "of a training run whose newest weights caption and draw", flag_values=FLAGS)
flags.DEFINE_string("weights", "", "folder of weights to caption and draw with, under --config", flag_values=FLAGS)
config_flags.DEFINE_config_file("config", None, "how --weights draw", lock_config=True, flag_values=FLAGS)
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
    "unified_bench": ("sources", "towers", "out"),
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
    rest = runtime.parse_flags(FLAGS, arguments)
    if len(rest) != 1 or rest[0] not in BENCHMARKS:
        raise UserError(f"name one benchmark ({', '.join(BENCHMARKS)}), not {' '.join(rest) or 'none'}")
    benchmark = rest[0]
    for name in BENCHMARKS[benchmark]:
        if not FLAGS[name].value:
            raise UserError(f"{benchmark} needs --{name}")
    runtime.prepare()
    {"unified_bench": unified_bench, "caption_duel": caption_duel}[benchmark]()


def model() -> Any:
    """The `bench.redrawing.Redrawer` of --workdir, or of --config and --weights.

    Raises:
      UserError: there is no such model, or none of the two is named.
    """
    import jax

    from uae_jax import sharding
    from uae_jax.bench import redrawing

    workdir = Path(FLAGS.workdir) if FLAGS.workdir else None
    if workdir is not None:
        config = reconstruct.load_config(workdir)
    elif FLAGS.config is not None:
        config = FLAGS.config.copy_and_resolve_references()
        configs.validate(config)
    else:
        raise UserError(
            "unified_bench needs pictures (--reconstructions) or a model that draws (--workdir or --config)"
        )
    config.unlock()
    if FLAGS.weights:
        config.weights = FLAGS.weights
    # Towers come from --towers.
    config.reward, config.monitor = ConfigDict({"length": 1.0}), ()
    config.eval.batch_size = len(jax.devices()) * -(-FLAGS.batch_size // len(jax.devices()))
    reconstruct.on_these_devices(config)
    mesh = sharding.make_mesh(config)
    built, params, step = reconstruct.load_run(config, workdir, mesh)
    print(f"drawing with weights of step {step}", file=sys.stderr)
    return redrawing.redrawer(config, built, mesh, params)


def unified_bench() -> None:
    """Scores redrawn pictures."""
    from uae_jax.bench import redrawing, unified_bench  # only now: jax reads its environment when it is imported

    sources, towers, out = Path(FLAGS.sources), parse_towers(FLAGS.towers), Path(FLAGS.out)
    captions, against = (Path(x) if x else None for x in (FLAGS.captions, FLAGS.against))
    settings = {"against": against, "compat": FLAGS.compat, "batch_size": FLAGS.batch_size}
    if FLAGS.reconstructions:
        if FLAGS.captions or FLAGS.workdir or FLAGS.config is not None:
            raise UserError("--reconstructions are scored as they are: leave out --captions, --workdir and --config")
        result = unified_bench.run(sources, Path(FLAGS.reconstructions), towers, out, **settings)
    else:
        unified_bench.open_towers(towers)  # before a large model is read
        result = redrawing.run(sources, model(), towers, out, captions, **settings)
    print(unified_bench.markdown(result), end="")
    for entry in result["missing"]:
        print(f"failed: {entry['source']}: {entry['reason']}", file=sys.stderr)
    for path, reason in result["bad_sources"].items():
        print(f"not scored: source {path}: {reason}", file=sys.stderr)
    if FLAGS.reconstructions and result["other_size"]:
        n, (first, *_) = len(result["other_size"]), result["other_size"]
        print(
            f"warning: {n} of {len(result['per_image'])} reconstructions have another size than their source "
            f"({first['source']}: {first['size']}, redrawn {first['reconstruction']}); listed under other_size",
            file=sys.stderr,
        )


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
