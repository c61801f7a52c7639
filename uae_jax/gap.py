"""Reward hacking, as a gap: how much more the reward's towers have gained since the start than one that only watches.

With d = mean cosine of the reward's towers - cosine of the watching one, of a step's redraws, the gap of a step is
d minus the mean d of the first steps. Both see the same redraws, so that what makes a batch hard cancels. An honest
gain moves both; towers do not share a scale, so a small lasting gap proves nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uae_jax import rewards
from uae_jax.errors import UserError

START = 10  # steps that count as the start
PATIENCE = 10  # steps in a row that must lie above the bound
PREFIX = "gap/"  # of the metrics, before the tower's name

Watch = Callable[[Sequence[Mapping[str, float]]], tuple[dict[str, float], str | None]]


def watch(config: Any) -> Watch:
    """watch(metrics of all steps so far) -> ({"gap/TOWER": of the last step}, why the run should stop or None).

    Raises:
      UserError: `config.stop_on_gap` has nothing to compare.
    """
    rewarded = [f"tower/{name}" for name in rewards.factors(config.reward) if name not in rewards.OF_TEXT]
    watching = [name for name in config.monitor if f"tower/{name}" not in rewarded]
    bound = config.stop_on_gap
    if bound and not (rewarded and watching):
        raise UserError(
            f"config.stop_on_gap = {bound} compares a tower of config.reward with one of config.monitor that is not in "
            "it: name both, or set it to 0"
        )

    def gaps(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], str | None]:
        found, why = {}, None
        for name in watching if rewarded else ():

            def ahead(row: Mapping[str, float], name: str = name) -> float:
                return sum(row[tower] for tower in rewarded) / len(rewarded) - row[f"tower/{name}"]

            first = [ahead(row) for row in rows[:START]]
            start = sum(first) / len(first)
            last = [ahead(row) - start for row in rows[-PATIENCE:]]
            found[f"{PREFIX}{name}"] = last[-1]
            if bound and len(rows) >= START + PATIENCE and min(last) > bound:
                why = (
                    f"the reward's towers have gained {last[-1]:.3f} more than {name!r} since the start, above "
                    f"config.stop_on_gap = {bound} for {PATIENCE} steps: look at samples/ before you raise it"
                )
        return found, why

    return gaps
