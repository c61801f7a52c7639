"""Scores known image by image: their means, and by how much two evaluations of the same images differ."""

import io
import math
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from uae_jax import storage
from uae_jax.errors import UserError


class Score(NamedTuple):
    """A ratio of two sums over images: a plain mean counts 1 an image, a recall every fact that an image shows."""

    sums: np.ndarray  # [n]
    counts: np.ndarray  # [n]

    @property
    def mean(self) -> float | None:
        """sum / count over all images; None where nothing was counted."""
        total = self.counts.sum()
        return float(self.sums.sum() / total) if total else None


Scores = dict[str, Score]  # by name; "/" separates groups: "controls/background_only"


def each(values: Any) -> Score:
    """The score whose mean is that of `values` [n]."""
    values = np.asarray(values, np.float64)
    return Score(values, np.ones(len(values)))


def total(parts: Iterable[Score]) -> Score:
    """All of them as one score of the same images."""
    sums, counts = zip(*parts, strict=True)
    return Score(sum(sums), sum(counts))  # type: ignore[arg-type]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, last = name.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


class Change(NamedTuple):
    """after - before, and the ends of its 95% interval (NaN where too few images show what is asked)."""

    mean: float
    low: float
    high: float

    def json(self) -> dict[str, float | None]:
        """As eval.json holds it."""
        return {name: None if math.isnan(value) else value for name, value in self._asdict().items()}


def change(before: Score, after: Score) -> Change | None:
    """How far two evaluations of the same images lie apart; None where either counted nothing.

    The interval is a paired bootstrap: images are drawn anew with replacement, each with its before and its after.
    """
    if before.mean is None or after.mean is None:
        return None

    def difference(s0: np.ndarray, c0: np.ndarray, s1: np.ndarray, c1: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a draw without any such image
            return s1.sum(axis) / c1.sum(axis) - s0.sum(axis) / c0.sum(axis)

    mean = after.mean - before.mean
    if len(before.sums) < 2:
        return Change(mean, math.nan, math.nan)
    settings: Any = {"method": "percentile", "n_resamples": 1000, "batch": 100, "rng": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the NaN says it
        found = stats.bootstrap((*before, *after), difference, paired=True, vectorized=True, **settings)
    low, high = found.confidence_interval
    return Change(mean, float(low), float(high))


def changes(before: Scores, after: Scores) -> dict[str, Change | None]:
    """The change of every score that both hold."""
    return {name: change(before[name], after[name]) for name in after if name in before}


HEADER = ("", "before", "after", "change", "95% interval")


def table(before: Scores, after: Scores, moved: Mapping[str, Change | None] | None = None) -> list[list[str]]:
    """Rows under `HEADER`; `moved` are their `changes`, where these are known already."""

    def number(value: float | None, sign: str = "") -> str:
        return "-" if value is None or math.isnan(value) else f"{value:{sign}.3f}"

    rows = []
    for name, found in (changes(before, after) if moved is None else moved).items():
        cells = (
            ["-", "-"]
            if found is None
            else [number(found.mean, "+"), f"{number(found.low, '+')} to {number(found.high, '+')}"]
        )
        rows.append(
            [
                name.removeprefix("by_category/").replace("/", " / "),
                number(before[name].mean),
                number(after[name].mean),
                *cells,
            ]
        )
    return rows


def save(path: Path, scores: Scores) -> None:
    """All sums and counts, image by image, as an .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: np.stack(score) for name, score in scores.items()})  # type: ignore[arg-type]
    storage.write_atomic(path, buffer.getvalue())


def load(path: Path) -> Scores:
    """What `save` wrote.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: Score(*arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}): it is written by an evaluated run of stage rl") from None


def pooled(parts: Sequence[Scores]) -> Scores:
    """The scores of several evaluations as one of all their images; what is not in all of them is left out."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    return {
        name: Score(*(np.concatenate(arrays) for arrays in zip(*(p[name] for p in parts), strict=True)))
        for name in names
    }
