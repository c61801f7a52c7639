"""Which checkpoints of a run stay on disk."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Keep(NamedTuple):
    """Which checkpoints stay: the newest, those of certain steps, and the best."""

    newest: int = 2  # with 1 there is none before it to go on from where it is damaged
    every: int = 0  # those of multiples of so many steps; 0: none for that
    best: str = ""  # the one with the best value of this metric, among those whose step measured it; "": none for that
    mode: str = "max"  # what is best: max or min

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The metric of a step, so that higher is better; None where it was not measured, or is not finite."""
        value = metrics.get(self.best, math.nan)
        return (value if self.mode == "max" else -value) if math.isfinite(value) else None

    def steps(self, steps: Sequence[int], values: Mapping[int, float]) -> set[int]:
        """Those of `steps` that stay; `values` are those of `value`, the earliest of equal ones is the best."""
        kept = set(sorted(steps)[-self.newest :]) | {step for step in steps if self.every and step % self.every == 0}
        measured = [step for step in sorted(steps) if step in values]
        return kept | ({max(measured, key=values.__getitem__)} if self.best and measured else set())


class Policy:
    """`Keep`, as orbax asks for it."""

    def __init__(self, keep: Keep, values: Mapping[int, float]):
        self.keep, self.values = keep, values

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each of `checkpoints`, which have a `step`, stays."""
        kept = self.keep.steps([info.step for info in checkpoints], self.values)
        return [info.step in kept for info in checkpoints]
