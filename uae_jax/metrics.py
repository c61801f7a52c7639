"""The one writer of a run: JSON lines, TensorBoard and the terminal."""

import datetime
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from uae_jax.pictures import encode_png, save_png
from uae_jax.printable import printable
from uae_jax.storage import close_at_exit, storage_errors, write_atomic

_FLUSH_SECONDS = 10.0  # TensorBoard's file; each flush waits for the disk
_BARS, _SPARK_WIDTH = "▁▂▃▄▅▆▇█", 48
_LINES = 50  # printed over a run where there is no terminal


def sparkline(values: Sequence[float], width: int = _SPARK_WIDTH) -> str:
    """At most `width` bars from the lowest to the highest of `values`, each the mean of its share; NaN is left out."""
    finite = np.asarray([value for value in values if math.isfinite(value)], np.float64)
    if not finite.size:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, finite.size))])
    low, span = means.min(), np.ptp(means)
    places = (means - low) / span * (len(_BARS) - 1) if span > 0 else np.zeros(len(means))
    return "".join(_BARS[round(place)] for place in places.tolist())


def read(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def trained_seconds(lines: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Time spent in training steps, from the images a second of each."""
    return sum(batch_size / line["throughput/images_per_s"] for line in lines)


def _keep_until(path: Path, step: int) -> None:
    """Drops what an interrupted run wrote past `step`, and a line that it did not finish."""
    with storage_errors(path):
        if not path.exists():
            return
        before = path.read_bytes()
    kept = []
    for line in before.split(b"\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    after = b"".join(kept)
    if after != before:
        write_atomic(path, after)


class Writer:
    """Writes what a run tells: metrics.jsonl, tensorboard/ and samples/ in the workdir, and the terminal.

    A context manager; between enter and exit a terminal shows a live panel (step, bar, the columns, time left and the
    course of the first column), anything else a plain line every fiftieth of the run. On a multi-host run only the
    first process writes; on the others every method does nothing. A fault of storage is a UserError naming the path.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        total_steps: int,
        columns: Mapping[str, tuple[str, str]],
        resume_step: int | None = None,
        console: Console | None = None,
    ):
        """Opens the files.

        Args:
          workdir: made where missing.
          total_steps: of the whole run, for the bar and the time left.
          columns: metric name -> (short label, format such as '.3f'): what the terminal shows, the first as a curve.
          resume_step: updates done by the checkpoint that the run goes on from: lines of later steps are dropped, so
            that the file comes out as that of a run without interruption. None or 0: a new run, all lines are dropped.
          console: where to print; stdout by default.
        """
        self.workdir = Path(workdir)
        self.total = total_steps
        self.columns = dict(columns)
        self.console = console or Console()
        self.active = jax.process_index() == 0
        self._latest: dict[str, float] = {}
        self._step = resume_step or 0
        self._curve: list[float] = []
        self._timed: tuple[float, int] | None = None  # when the first step of this process was done, and which
        self._live: Live | None = None
        if not self.active:
            return
        lines, board = self.workdir / "metrics.jsonl", self.workdir / "tensorboard"
        with storage_errors(self.workdir):
            board.mkdir(parents=True, exist_ok=True)
        _keep_until(lines, resume_step or -1)
        with storage_errors(lines):
            self._lines = open(lines, "a", encoding="utf-8")  # noqa: SIM115
        with storage_errors(board):
            # Written in this thread: the queue of tensorboardX's own SummaryWriter blocks for ever on a full disk.
            # TensorBoard reads files in the order of their names, which would otherwise be that of the clock.
            self._board = EventsWriter(str(board / f"events.{len(list(board.iterdir())):06d}"))
            # TensorBoard hides what earlier files hold from this step on.
            start = Event(session_log=SessionLog(status=SessionLog.START), step=self._step + 1 if self._step else 0)
            self._board.write_event(start)
            self._board.flush()
        self._flushed = time.monotonic()

    def __enter__(self) -> "Writer":
        if self.active and self.console.is_terminal:
            self._live = Live(get_renderable=self._panel, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        close_at_exit(self.close, kind)

    def close(self) -> None:
        """Ends the live display and closes the files."""
        if not self.active:
            return
        if self._live is not None:
            self._live.stop()
            self._live = None
        with storage_errors(self.workdir / "tensorboard"):
            self._board.close()
        with storage_errors(self.workdir / "metrics.jsonl"):
            self._lines.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, the scalars to TensorBoard, and brings the terminal up to date.

        Args:
          step: updates done.
          metrics: name -> number (Python, NumPy or a device scalar); one that is not finite becomes null in the file.
        """
        if not self.active:
            return
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with storage_errors(self.workdir / "metrics.jsonl"):
            self._lines.write(json.dumps({"step": int(step), **finite}) + "\n")
            self._lines.flush()
        self._summary(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._show(step, values)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Adds a picture, uint8 [H, W, 3], to TensorBoard and as samples/{name}_{step:06d}.png."""
        if not self.active:
            return
        save_png(self.workdir / "samples" / f"{name}_{step:06d}.png", picture)
        height, width, _ = picture.shape
        png = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(picture))
        self._summary(step, [Summary.Value(tag=name, image=png)])

    def arrays(self, step: int, name: str, **arrays: Any) -> None:
        """Keeps arrays (of numbers or texts) as samples/{name}_{step:06d}.npz."""
        if not self.active:
            return
        pickled = [name for name, value in arrays.items() if np.asarray(value).dtype.hasobject]
        if pickled:
            raise ValueError(f"{name}: {', '.join(pickled)} would be written as pickles")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(self.workdir / "samples" / f"{name}_{step:06d}.npz", buffer.getvalue())

    def message(self, text: str) -> None:
        """Prints a line, above the live display where there is one."""
        if self.active:
            self.console.print(Text(printable(text)), soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table; the first column is left-aligned, the others right."""
        if not self.active:
            return
        table = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(header):
            table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self.console.print(table)

    def _summary(self, step: int, values: list[Any]) -> None:
        with storage_errors(self.workdir / "tensorboard"):
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._board.flush()
                self._flushed = time.monotonic()

    def _show(self, step: int, values: dict[str, float]) -> None:
        shown = [name for name in self.columns if name in values]
        if not shown:
            return
        # The first step is compilation: the time left is reckoned from its end.
        if self._timed is None:
            self._timed = (time.monotonic(), step)
        self._step, self._latest = step, {**self._latest, **values}
        first = next(iter(self.columns))
        if math.isfinite(values.get(first, math.nan)):
            self._curve.append(values[first])
        if not self.console.is_terminal and (step % max(1, self.total // _LINES) == 0 or step == self.total):
            cells = [f"{label} {self._cell(name):>9}" for name, (label, _) in self.columns.items()]
            line = f"step {step:>{len(str(self.total))}}/{self.total}  {'  '.join(cells)}  {self._time_left()}"
            self.message(line.rstrip())

    def _cell(self, name: str) -> str:
        return format(self._latest[name], self.columns[name][1]) if name in self._latest else "-"

    def _time_left(self) -> str:
        if self._timed is None or self._step <= self._timed[1]:
            return ""
        began, first = self._timed
        seconds = (time.monotonic() - began) / (self._step - first) * max(0, self.total - self._step)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def _panel(self) -> Panel:
        bar = Table.grid(padding=(0, 2))
        progress = ProgressBar(total=self.total, completed=self._step, width=40)
        bar.add_row(Text(f"step {self._step}/{self.total}"), progress, Text(self._time_left()))
        numbers = Table.grid(padding=(0, 2))
        labels = [label for label, _ in self.columns.values()]
        numbers.add_row(*(Text(label, style="dim") for label in labels))
        numbers.add_row(*(Text(self._cell(name), style="bold") for name in self.columns))
        parts: list[Any] = [bar, numbers]
        if len(self._curve) > 1:
            low, high = min(self._curve), max(self._curve)
            spec = next(iter(self.columns.values()))[1]
            line = f"{labels[0]} {format(low, spec)} {sparkline(self._curve)} {format(high, spec)}"
            parts.append(Text(line, style="green"))
        return Panel(Group(*parts), title=Text(printable(str(self.workdir))), title_align="left", expand=False)
