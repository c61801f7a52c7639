"""Does it learn, and honestly? Unified-GRPO on the tiny world from several seeds, against a list set beforehand.

    python -m benchmarks.learns --out=runs/learns [--seeds=21,22,23] [--held_out=2048] [--config.FIELD=VALUE]
    python -m benchmarks.learns --file=configs/tiny_ar.py --minutes=8 --out=runs/learns_ar

Trains configs/tiny.py, or --file, once a seed, each on its own scenes with its own held-out split, writes the report
(table.md, curves.png, redraws.png: what the README shows) and claims.md to --out. About 6 minutes a seed on two cores.
`--live` adds a run whose text encoder is the captioner in training, and live.png: its canary beside the frozen one.
With `--config.weights=DIR --beside=runs/learns` it starts from other weights, and beside.md compares both on the same
held-out scenes.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from uae_jax import report, runtime, storage
from uae_jax.bench import scores
from uae_jax.bench.scores import Scores
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "runs/learns", "folder of the runs and of the report", flag_values=FLAGS)
flags.DEFINE_string("file", "configs/tiny.py", "the config that is trained", flag_values=FLAGS)
flags.DEFINE_integer("minutes", 6, "longest training that is claimed", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_list("seeds", ["21", "22", "23"], "one run each", flag_values=FLAGS)
flags.DEFINE_string("beside", "", "--out of earlier runs with the same seeds, to compare with", flag_values=FLAGS)
flags.DEFINE_bool("live", False, "also run the live text encoder, with the first seed", flag_values=FLAGS)
flags.DEFINE_integer("held_out", 2048, "held-out scenes a run", lower_bound=2, flag_values=FLAGS)

Claim = Callable[[Scores, Scores, float], tuple[str, bool]]


def mean(part: Scores, name: str) -> float:
    """A score that must exist."""
    value = part[name].mean
    assert value is not None, name
    return value


def gain(before: Scores, after: Scores, name: str) -> scores.Change:
    """A change that must exist."""
    found = scores.change(before[name], after[name])
    assert found is not None, name
    return found


def at_least(value: float, bound: float, sign: str = "") -> tuple[str, bool]:
    """How the value is written, and whether it reaches the bound."""
    return f"{value:{sign}.3f}", value >= bound


def perceives(before: Scores, _after: Scores, _seconds: float) -> tuple[str, bool]:
    """The weakest attribute at the start."""
    return at_least(min(mean(before, name) for name in before if name.startswith("by_category/perception/")), 0.95)


def still_perceives(before: Scores, after: Scores, _seconds: float) -> tuple[str, bool]:
    """No attribute's interval lies below zero."""
    names = [name for name in after if name.startswith("by_category/perception/")]
    moved = {name.rsplit("/", 1)[1]: gain(before, after, name) for name in names}
    worst = min(moved, key=lambda name: moved[name].high)
    return f"worst: {worst} {show(moved[worst])}", moved[worst].high >= 0


def show(change: scores.Change) -> str:
    """With its interval."""
    return f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})"


def rises(name: str, least: float = 0.0) -> Claim:
    """The score's gain is at least `least`, and its interval excludes zero."""

    def claim(before: Scores, after: Scores, _seconds: float) -> tuple[str, bool]:
        found = gain(before, after, name)
        return show(found), found.mean >= least and found.low > 0

    return claim


def beyond_background(before: Scores, after: Scores, _seconds: float) -> tuple[str, bool]:
    """Share of the gain that remains against starting captions with the true background added."""
    start, end = mean(before, "reward"), mean(after, "reward")
    return at_least((end - mean(before, "controls/with_true_background")) / (end - start), 0.8)


def closes(before: Scores, after: Scores, _seconds: float) -> tuple[str, bool]:
    """Share of the distance from start to ceiling."""
    start, ceiling = mean(before, "reward"), mean(before, "reward_ceiling")
    return at_least((mean(after, "reward") - start) / (ceiling - start), 0.5)


def length(before: Scores, _after: Scores, _seconds: float) -> tuple[str, bool]:
    """Starting captions against complete ones."""
    share = mean(before, "caption_length") / mean(before, "complete_length")
    return f"{share:.3f}", share <= 0.5


def in_time(minutes: int) -> dict[str, Claim]:
    """The claim on time."""
    return {f"training under {minutes} minutes": lambda b, a, s: (f"{s / 60:.1f} min", s < 60 * minutes)}


CLAIMS: dict[str, Claim] = {
    "start: ceiling at least .90": lambda b, a, s: at_least(mean(b, "reward_ceiling"), 0.90),
    "start: forced-choice perception at least .95 on every attribute": perceives,
    "start: captions at most half as long as complete ones": length,
    "malformed captions at most 1%": lambda b, a, s: (
        f"{mean(a, 'caption_malformed'):.4f}",
        mean(a, "caption_malformed") <= 0.01,
    ),
    "precision of facts not down by more than 2 points": lambda b, a, s: at_least(
        gain(b, a, "caption_precision").mean, -0.02, "+"
    ),
    "perception not down beyond its interval on any attribute": still_perceives,
    "the unseen tower agrees": rises("reward_second_tower"),
    "the attribute judge agrees": rises("redraw_accuracy"),
    "gain beyond the background at least 80% of the gain": beyond_background,
    "the reward's gain excludes zero": rises("reward"),
    "at least half of the distance from start to ceiling": closes,
    "recall of facts up by at least 15 points": rises("caption_recall", 0.15),
    "... of small objects too": rises("by_category/facts/small_objects/recall", 0.15),
    "captions longer": rises("caption_length"),
}


def claims(runs: list[report.Run], minutes: int) -> str:
    """Markdown: each claim on all runs together, and in how many of them it holds alone."""
    before, after = (scores.pooled([getattr(run, when) for run in runs]) for when in ("before", "after"))
    longest = max(run.seconds for run in runs)
    lines = ["| claim | measured | holds | in each run |", "|---|---|---|---|"]
    for name, claim in (in_time(minutes) | CLAIMS).items():
        measured, holds = claim(before, after, longest)
        alone = [claim(run.before, run.after, run.seconds)[1] for run in runs]
        lines.append(f"| {name} | {measured} | {'yes' if holds else 'NO'} | {sum(alone)} of {len(alone)} |")
    return "\n".join(lines) + "\n"


def beside(first: list[report.Run], second: list[report.Run]) -> str:
    """Markdown: where two starts begin and end, and the paired difference of their ends on the same held-out scenes."""
    starts = [scores.pooled([run.before for run in runs]) for runs in (first, second)]
    ends = [scores.pooled([run.after for run in runs]) for runs in (first, second)]
    lines = ["| | first, before | second, before | first, after | second, after | difference | 95% interval |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for begun, ended in zip(scores.table(*starts), scores.table(*ends), strict=True):
        lines.append(f"| {' | '.join([*begun[:3], *ended[1:]])} |")
    return "\n".join(lines) + "\n"


def train(workdir: Path, seed: str, overrides: list[str]) -> None:
    """One run of the config, resumed where it stopped.

    Raises:
      UserError: it failed.
    """
    command = [sys.executable, "-m", "uae_jax.main", f"--config={FLAGS.file}", f"--workdir={workdir}"]
    done = subprocess.run([*command, f"--config.seed={seed}", *overrides], check=False)
    if done.returncode:
        raise UserError(f"the run in {workdir} ended with exit code {done.returncode}; the same command resumes it")


def draw_live(live: report.Run, frozen: report.Run, out: Path) -> None:
    """live.png: the live text encoder with its canary, beside the frozen one."""
    with storage.storage_errors(out):
        report.curves([live, frozen]).savefig(out / "live.png", dpi=120)


def main(arguments: list[str]) -> None:
    """Trains, reports and checks."""
    own = [argument for argument in arguments if not argument.startswith("--config.")]
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    try:
        FLAGS(own)
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    out = Path(FLAGS.out)
    overrides.append(f"--config.data.held_out={FLAGS.held_out}")
    workdirs = [out / f"seed_{seed}" for seed in FLAGS.seeds]
    for seed, workdir in zip(FLAGS.seeds, workdirs, strict=True):
        train(workdir, seed, overrides)
    runs = report.write(workdirs, out)
    if FLAGS.live:
        train(out / "live", FLAGS.seeds[0], [*overrides, "--config.text_encoder=live"])
        draw_live(report.load(out / "live"), runs[0], out)
    storage.write_atomic(out / "claims.md", claims(runs, FLAGS.minutes).encode())
    if FLAGS.beside:
        others = [report.load(Path(FLAGS.beside) / workdir.name) for workdir in workdirs]
        storage.write_atomic(out / "beside.md", beside(others, runs).encode())
    print((out / "table.md").read_text(), (out / "claims.md").read_text(), f"wrote {out}", sep="\n")


if __name__ == "__main__":
    runtime.run(main, sys.argv)
