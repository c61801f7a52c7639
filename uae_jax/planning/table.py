"""Plans that `uae_jax.plan --json` wrote, as a Markdown table.

python -m uae_jax.planning.table PLAN.json [PLAN.json ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

from uae_jax import runtime
from uae_jax.errors import UserError

HEADER = (
    "config", "topology", "chips", "mesh", "images", "fits", "GiB a chip", "PFLOP a step", "s a step", "s, bound",
    "images/s",
)  # fmt: skip


def row(plan: dict[str, Any]) -> list[str]:
    """The cells of a plan; those that no compiler measured are marked by a tilde."""
    phases = {name: part for name, part in plan["phases"].items() if name != "step"}
    measured = all(part["compiled"] for part in phases.values())
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    mesh = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "-"
    peak = f"{plan['peak_gib_per_chip']:.1f} of {plan['hbm_gib_per_chip']:.1f}, {plan['peak_phase']}"
    times = ", ".join(f"{name} {part['seconds']:.2g} {part['bound']}" for name, part in phases.items())
    return [
        plan["config"], slices + plan["topology"], str(plan["chips"]), mesh, str(plan["images"]),
        ("yes" if plan["fits"] else "no") if measured or not plan["fits"] else "may",
        peak if measured else f"~ {peak}", f"{plan['flops_per_chip'] * plan['chips'] / 1e15:.3g}",
        f"{plan['seconds_estimate']:.3g}", times, f"{plan['images_per_s']:.3g}",
    ]  # fmt: skip


def table(plans: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *map(row, plans)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main(arguments: list[str]) -> None:
    """Prints the table of the files that the command line names."""
    if not arguments[1:]:
        raise UserError("no plans: name the files that python -m uae_jax.plan --json=FILE wrote")
    plans = []
    for path in map(Path, arguments[1:]):
        try:
            plans.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read a plan from {path}: {error}") from None
    print(table(plans))


if __name__ == "__main__":
    runtime.run(main, sys.argv)
