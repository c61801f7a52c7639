"""In which order records are read: which one stands at a global position is a pure function of (seed, position)."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import grain
import numpy as np

from uae_jax.data.images import BadImage
from uae_jax.errors import UserError

IN_A_ROW = 1000  # bad records: a disk that is gone, rather than a damaged file here and there
T = TypeVar("T")

Rows = Sequence[int] | np.ndarray  # some rows of a batch, by their numbers


class Order:
    """An endless sequence of groups of indices: each group in epochs without a gap, every epoch shuffled differently.

    Several groups are a mixture: a position's group is fixed by the weights alone (`grain.MapDataset.mix`), so that
    any stretch of positions holds the groups by their weights. Nothing depends on how many processes read.

    Args:
      groups: indices of the records of each part.
      weights: of the parts, one each.
      seed: of the shuffles.

    Raises:
      UserError: there is no group, or one is empty.
    """

    def __init__(self, groups: Sequence[Sequence[int]], weights: Sequence[float], seed: int):
        if not groups or not all(len(group) for group in groups):
            raise UserError("cannot make batches from 0 images")
        self._indices = np.concatenate([np.asarray(group, np.int32) for group in groups])
        self._ends = np.cumsum([len(group) for group in groups])
        parts = []
        for number, (end, group) in enumerate(zip(self._ends, groups, strict=True)):
            # grain shuffles epoch e with seed + e: mixing the seed first keeps run 1 from being run 0 an epoch later.
            entropy = [seed, number] if number else seed
            mixed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            parts.append(grain.MapDataset.range(int(end) - len(group), int(end)).shuffle(seed=mixed).repeat())
        self._places = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, list(weights))

    def candidates(self, position: int) -> "Candidates":
        """The index at a position, then those that stand in for it, in turn: the ones after it in its group."""
        place = int(self._places[position])
        group = int(np.searchsorted(self._ends, place, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        return Candidates(self._indices[start : int(self._ends[group])], place - start)


class Candidates:
    """`indices` from `first` on, and round to the one before it; nothing is copied."""

    def __init__(self, indices: np.ndarray, first: int):
        self._of, self._first = indices, first

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[int]:
        for offset in range(len(self._of)):
            yield int(self._of[(self._first + offset) % len(self._of)])


class Bad(NamedTuple):
    """A record that cannot be used."""

    name: str
    reason: str


def first_usable(order: Order, position: int, read: Callable[[int], T]) -> tuple[T, list[Bad]]:
    """What `read` makes of the first of a position's candidates that is no BadImage, and those before it.

    Raises:
      UserError: none of the candidates, or none of the first 1,000, is usable.
    """
    bad: list[Bad] = []
    candidates = order.candidates(position)
    for index in itertools.islice(candidates, IN_A_ROW):
        try:
            return read(index), bad
        except BadImage as error:
            bad.append(Bad(error.path, error.reason))
    which = f"none of the {len(bad)} pictures" if len(bad) == len(candidates) else f"{len(bad)} pictures in a row, none"
    shown = "; ".join(f"{name} ({reason})" for name, reason in bad[:5])
    raise UserError(f"{which} can be read: {shown}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}")


class Tally:
    """Counts the records that turn out to be bad, each once, names them in warnings, and says when it is too many.

    Args:
      total: number of all records.
      fraction: of them that may be bad (`config.data.max_bad_fraction`).
    """

    def __init__(self, total: int, fraction: float):
        self.total, self.fraction = total, fraction
        self.bad: dict[str, str] = {}

    def add(self, found: Iterable[Bad]) -> None:
        """Raises UserError once more than the fraction of all records are bad."""
        for name, reason in found:
            if name in self.bad:
                continue
            self.bad[name] = reason
            logging.warning("skipped %s: %s (%d of %d records are bad)", name, reason, len(self.bad), self.total)
            if len(self.bad) > self.fraction * self.total:
                raise UserError(
                    f"{len(self.bad)} of {self.total} records are bad, more than config.data.max_bad_fraction = "
                    f"{self.fraction} allows; the last is {name}: {reason}"
                )
