"""What runs came to: `python -m uae_jax.report WORKDIR... --out=DIR` writes a table and two pictures.

table.md: every score before and after, the paired change with its 95% interval over the held-out images of all runs
together, and the change in each run. curves.png: reward and caption length against steps (the paper's Figure 8), the
canary of a live text encoder, and how far the reward's towers run ahead of monitored ones (`gap`). redraws.png: the
same held-out images redrawn along the way (its Figure 5), of the first run.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from uae_jax import gap, pictures, runtime, storage
from uae_jax.bench import scores
from uae_jax.bench.scores import Scores
from uae_jax.errors import UserError
from uae_jax.metrics import read, trained_seconds

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "", "folder to write to; report/ in the first workdir by default", flag_values=FLAGS)

MOST_COLUMNS = 6  # of redraws, beside the source
CURVES = {"reward/mean": "reward", "caption/length": "caption length, tokens", "canary/reference_reward": "canary"}


class Run(NamedTuple):
    """What a finished run left in its workdir."""

    workdir: Path
    metrics: list[dict[str, Any]]  # one a step
    before: Scores
    after: Scores

    @property
    def seconds(self) -> float:
        """Time spent in training steps, compilation included."""
        batch = json.loads((self.workdir / "config.json").read_text())["data"]["batch_size"]
        return trained_seconds(self.metrics, batch)


def load(workdir: Path) -> Run:
    """Reads a finished run.

    Raises:
      UserError: there is none, or it was not evaluated.
    """
    path = workdir / "metrics.jsonl"
    try:
        metrics = read(workdir)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the workdir of a finished run") from None
    return Run(workdir, metrics, *(scores.load(workdir / f"eval_{when}.npz") for when in ("before", "after")))


def table(runs: list[Run]) -> str:
    """Markdown: all scores of all runs together, and the change in each."""
    before, after = (scores.pooled([getattr(run, when) for run in runs]) for when in ("before", "after"))
    header = [*scores.HEADER, *(["in each run"] if len(runs) > 1 else [])]
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    for name, row in zip(after, scores.table(before, after), strict=True):
        if len(runs) > 1:
            row.append(" ".join(moved(run, name) for run in runs))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def moved(run: Run, name: str) -> str:
    """A score's change in one run."""
    before, after = run.before[name].mean, run.after[name].mean
    return "-" if before is None or after is None else f"{after - before:+.3f}"


def curves(runs: list[Run]) -> Any:
    """A matplotlib figure: every curve against steps, a line a run, the ceiling dashed.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the curves need matplotlib: pip install 'uae_jax[eval]'") from None

    logged = {name for row in runs[0].metrics for name in row}
    shown = {name: label for name, label in CURVES.items() if name in logged}
    gaps = {name: f"gap to {name.removeprefix(gap.PREFIX)}" for name in sorted(logged) if name.startswith(gap.PREFIX)}
    shown |= gaps
    figure = Figure(figsize=(4.5 * len(shown), 3.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (name, label) in zip(axes, shown.items(), strict=True):
        for run in runs:
            points = [(row["step"], row[name]) for row in run.metrics if row.get(name) is not None]
            steps, values = np.array(points).reshape(-1, 2).T
            axis.plot(steps, values, linewidth=1, label=run.workdir.name, marker="." if len(points) < 30 else None)
        if name != "caption/length" and name not in gaps and "reward_ceiling" in runs[0].before:
            ceiling = scores.pooled([run.before for run in runs])["reward_ceiling"].mean
            axis.axhline(ceiling, color="gray", linestyle="--", linewidth=1, label="ceiling at the start")
        axis.set(xlabel="step", title=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def redraws(run: Run) -> np.ndarray:
    """A sheet uint8 [H, W, 3]: held-out images, and what their most likely captions drew along the way.

    Raises:
      UserError: the run kept no redraws.
    """
    paths = sorted((run.workdir / "samples").glob("held_out_*.npz"))
    if not paths:
        raise UserError(f"{run.workdir / 'samples'} holds no redraws: run with config.eval.enabled")
    # Most happens early.
    chosen = sorted(set((np.geomspace(1, len(paths), MOST_COLUMNS).round() - 1).astype(int).tolist()))
    kept = []
    for i in chosen:
        with np.load(paths[i], allow_pickle=False) as file:
            kept.append({name: file[name] for name in file.files})
    source = kept[0]["source"]
    rows = [[source[i], *(one["redrawn"][i] for one in kept)] for i in range(len(source))]
    captions = [["", *(str(one["caption"][i]) for one in kept)] for i in range(len(source))]
    header = ["source", *(f"step {int(paths[i].stem.rsplit('_', 1)[1])}" for i in chosen)]
    return pictures.grid(rows, captions, header, scale=max(1, 144 // source.shape[1]))


def write(workdirs: list[Path], out: Path) -> list[Run]:
    """Writes table.md, curves.png and redraws.png to `out`; returns the runs."""
    runs = [load(workdir) for workdir in workdirs]
    storage.write_atomic(out / "table.md", table(runs).encode())
    with storage.storage_errors(out):
        curves(runs).savefig(out / "curves.png", dpi=120)
    pictures.save_png(out / "redraws.png", redraws(runs[0]))
    return runs


def main(arguments: list[str]) -> None:
    """Parses the command line and writes the report."""
    try:
        workdirs = [Path(name) for name in FLAGS(arguments)[1:]]
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if not workdirs:
        raise UserError("usage: python -m uae_jax.report WORKDIR... [--out=DIR]")
    out = Path(FLAGS.out) if FLAGS.out else workdirs[0] / "report"
    write(workdirs, out)
    print((out / "table.md").read_text() + f"\nwrote {out}: table.md, curves.png, redraws.png")


if __name__ == "__main__":
    runtime.run(main, sys.argv)
