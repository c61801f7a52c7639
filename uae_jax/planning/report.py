"""What a plan came to, as a table to read and as JSON."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from uae_jax.planning.compiler import Compiled, gib
from uae_jax.planning.flops import Work
from uae_jax.planning.partitioned import KINDS
from uae_jax.planning.roofline import Estimate, Load
from uae_jax.planning.topology import Topology

# Products counted after partitioning may exceed those of the jaxpr by this factor before the table says so.
REPEATED_WORK = 1.2


class Result(NamedTuple):
    """One phase of a plan."""

    name: str
    work: Work
    load: Load
    time: Estimate
    compiled: Compiled | None  # None: by arithmetic only


class Plan(NamedTuple):
    """A config on a machine."""

    config_name: str
    topology: Topology
    mesh: dict[str, int]
    images: int  # a step
    tokens: int  # a step, if all captions are as long as they may be
    resident: dict[str, float]  # bytes a chip that stay through the step: weights, trained, optimizer
    batch: float  # bytes a chip of what phases hand on
    writing: str  # the phase with the token loop that holds most
    held: dict[str, float]  # bytes a chip inside its temporaries: cache, decode view
    parts: list[Result]
    whole: Result | None  # the step as one program
    stand_in: bool
    on_chip: bool
    price: float  # of a chip, an hour; 0: not given

    @property
    def seconds(self) -> float:
        return sum(part.time.seconds for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.work.flops(self.topology.chips) for part in self.parts)

    @property
    def compiled(self) -> bool:
        return any(part.compiled for part in (*self.parts, self.whole) if part)

    @property
    def largest(self) -> tuple[str, float]:
        """The phase with the highest need of memory, and bytes a chip; a lower bound if nothing was compiled."""
        if self.whole and (program := self.whole.compiled):
            return self.whole.name, program.arguments + program.beyond_arguments
        fixed = sum(self.resident.values()) + self.batch
        peaks = [(part.name, fixed + part.compiled.beyond_arguments) for part in self.parts if part.compiled]
        floor = (self.writing, fixed + sum(self.held.values()))
        return max(peaks, key=lambda peak: peak[1]) if peaks else floor

    @property
    def fits(self) -> bool:
        failed = any(part.compiled and part.compiled.memory is None for part in (*self.parts, self.whole) if part)
        return not failed and self.largest[1] <= self.topology.chip.hbm

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    @property
    def cost(self) -> float:
        """Of a thousand images."""
        return self.price * self.topology.chips * self.seconds / 3600 / self.images * 1000


def advice(plan: Plan) -> list[str]:
    """What to change when it does not fit, most promising first."""
    resident, hbm = sum(plan.resident.values()), plan.topology.chip.hbm
    fsdp = "raise config.mesh.fsdp (weights are split over it) or use more chips"
    if resident > 0.8 * hbm:
        return [
            f"weights and optimizer alone take {gib(resident):.1f} of {gib(hbm):.1f} GiB: {fsdp}",
            "train adapters (config.lora.rank) or a smaller config.trainable",
            "config.dtype=bfloat16",
        ]
    rollout = "a larger config.rl.rollout_microbatches (with a batch that still divides over the chips)"
    by_phase = {
        "sample": [rollout, "a smaller config.data.batch_size, config.rl.group_size or config.rl.max_tokens"],
        "redraw": [rollout, "config.redraw.slice_vae=True", "config.redraw.two_passes=True"],
        "score": [rollout, "fewer towers in config.monitor"],
        "update": [
            "a larger config.rl.microbatches (with a batch that still divides over the chips)",
            "a smaller config.rl.logit_chunk",
            "config.remat=full",
        ],
    }
    name = plan.largest[0]
    if name == plan.writing and plan.held["decode view"] > 0.5 * hbm:
        return [
            f"the token loop reads {gib(plan.held['decode view']):.1f} GiB of the captioner's weights on every chip: "
            "raise config.mesh.tensor, or use chips with more memory",
            *by_phase[name],
        ]
    return [*by_phase.get(name, [words for part in by_phase.values() for words in part]), fsdp]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; `fits`, `peak_gib_per_chip`, `flops_per_chip`, `seconds_estimate`, `phases` and
    `collectives` are keys that others rely on."""
    chips, chip = plan.topology.chips, plan.topology.chip
    name, peak = plan.largest
    everything = [*plan.parts, *([plan.whole] if plan.whole else [])]
    return {
        "config": plan.config_name,
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": chips,
        "mesh": plan.mesh,
        "images": plan.images,
        "fits": plan.fits,
        "peak_gib_per_chip": gib(peak),
        "peak_phase": name,
        "hbm_gib_per_chip": gib(chip.hbm),
        "flops_per_chip": plan.flops,
        "seconds_estimate": plan.seconds,
        "images_per_s": plan.images_per_s,
        "tokens_per_s": plan.tokens / plan.seconds,
        "cost_per_1000_images": plan.cost or None,
        "memory_gib_per_chip": {k: gib(v) for k, v in {**plan.resident, "batch": plan.batch, **plan.held}.items()},
        "phases": {part.name: _phase_json(part, chips) for part in everything},
        "collectives": [
            {"phase": part.name, **collective._asdict()}
            for part in everything
            if part.compiled and part.compiled.program
            for collective in part.compiled.program.collectives
        ],
        "prompt_tokens_estimated": plan.stand_in,
        "figures": chip._asdict(),
        "notes": notes(plan),
        "advice": [] if plan.fits else advice(plan),
    }


def _phase_json(part: Result, chips: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seconds": part.time.seconds,
        "bound": part.time.bound,
        "seconds_by_resource": part.time._asdict(),
        "flops_per_chip": part.work.flops(chips),
        "bytes_per_chip": {"hbm": part.load.hbm, "ici": part.load.ici, "dcn": part.load.dcn},
        "compiled": part.compiled is not None,
    }
    if part.compiled:
        memory, program = part.compiled.memory, part.compiled.program
        found["compile_seconds"] = part.compiled.seconds
        found["memory_gib_per_chip"] = memory and {name: gib(x) for name, x in memory._asdict().items()}
        found["compiler_message"] = part.compiled.message
        if program:
            found["flops_per_chip_partitioned"] = program.flops
            found["unknown_loops"] = program.unknown_loops
    return found


def notes(plan: Plan) -> list[str]:
    """What of this the compiler measured, and what is reckoned."""
    lines = ["exact: weights, trained parameters and optimizer on a chip (their shapes and layout)"]
    chips = plan.topology.chips
    if plan.compiled:
        if left := [part.name for part in plan.parts if not part.compiled]:
            lines.append(f"not compiled, by arithmetic alone, and not in the peak: {', '.join(left)}")
        compiler = "XLA's CPU compiler" if plan.topology.chip.platform == "cpu" else "the machine's own compiler"
        lines.append(f"measured by {compiler}: temporaries, collectives and their sizes, whether it fits")
        if plan.whole is None:
            lines.append(
                "peak: all that is resident, and the largest part compiled alone; --whole compiles one program"
            )
        repeated = [
            f"{part.name} {part.compiled.program.flops / part.work.flops(chips):.1f}x"
            for part in plan.parts
            if part.compiled
            and part.compiled.program
            and part.compiled.program.flops > REPEATED_WORK * part.work.flops(chips)
        ]
        if repeated:
            lines.append(f"chips repeat each other's work: {', '.join(repeated)} the FLOPs of an even split")
    elif sum(plan.resident.values()) > plan.topology.chip.hbm:
        lines.append("not compiled: what is resident does not fit, so that nothing else can")
    else:
        lines.append("not compiled, by arithmetic alone: the peak is a lower bound, without most temporaries")
    lines.append("counted on the jaxpr, with every loop run to its end: FLOPs; all captions of full length")
    lines.append(f"estimated: seconds, a lower bound from published figures ({plan.topology.chip.source})")
    if plan.on_chip:
        lines.append("not offloaded: without its GPU this compiler knows no host memory; it is counted on the chip")
    if plan.stand_in:
        lines.append("estimated: length of the prompts (words and signs; the folder of weights has no tokenizer.json)")
    return lines


def columns(rows: list[list[str]]) -> str:
    """Rows aligned; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return "\n".join(lines)


def as_text(plan: Plan) -> str:
    """The plan to read."""
    chip, (name, peak) = plan.topology.chip, plan.largest
    axes = ", ".join(f"{axis}={n}" for axis, n in plan.mesh.items())
    known = all(part.compiled for part in plan.parts)
    verdict, margin = (
        ("fits" if known else "may fit", chip.hbm - peak) if plan.fits else ("DOES NOT FIT", peak - chip.hbm)
    )
    by = f"{gib(abs(margin)):.2f} GiB {'to spare' if plan.fits else 'too much'}"
    by = by if plan.fits or margin > 0 else "the compiler does not say by how much"
    text = [
        f"{plan.config_name} on {plan.topology}: {plan.topology.chips} chips, mesh {axes}",
        f"{verdict}: peak {'' if known else '>= '}{gib(peak):.2f} of {gib(chip.hbm):.2f} GiB a chip, in {name}; {by}",
        "",
    ]
    rows = [["GiB a chip", ""]] + [[part, f"{gib(size):.3f}"] for part, size in plan.resident.items()]
    rows += [["batch", f"{gib(plan.batch):.3f}"]]
    rows += [[f"{part} (in temporaries of {plan.writing})", f"{gib(size):.3f}"] for part, size in plan.held.items()]
    text += [columns(rows), "", columns(_phase_rows(plan)), ""]
    failed = [part for part in (*plan.parts, plan.whole) if part and part.compiled and part.compiled.memory is None]
    text += [f"{part.name}: the compiler says: {part.compiled.message}" for part in failed if part.compiled]
    collectives = _collective_rows(plan)
    if len(collectives) > 1:
        text += [columns(collectives), ""]
    rates = f"{plan.images_per_s:.3g} images/s, {plan.tokens / plan.seconds:.4g} caption tokens/s"
    cost = f", {plan.cost:.4g} for 1,000 images" if plan.price else ""
    text += [f"a step: {plan.flops:.3e} FLOPs a chip, {plan.seconds:.4g} s at best; {rates}{cost}", ""]
    text += [f"- {note}" for note in notes(plan)]
    if not plan.fits:
        text += ["", "to make it fit:", *(f"- {line}" for line in advice(plan))]
    return "\n".join(text)


def _phase_rows(plan: Plan) -> list[list[str]]:
    head = [
        "phase",
        "s, at best",
        "bound",
        "compute",
        "HBM",
        "ICI",
        "DCN",
        "FLOPs a chip",
        "GiB temporaries",
        "compiled s",
    ]
    rows = [head]
    for part in (*plan.parts, *([plan.whole] if plan.whole else [])):
        compiled = part.compiled
        memory = "-" if compiled is None else "too much"
        if compiled and compiled.memory:
            memory = f"{gib(compiled.memory.temporaries):.3f}"
        rows.append([
            part.name, f"{part.time.seconds:.4g}", part.time.bound, *(f"{seconds:.3g}" for seconds in part.time),
            f"{part.work.flops(plan.topology.chips):.3e}", memory, f"{compiled.seconds:.0f}" if compiled else "-",
        ])  # fmt: skip
    return rows


def _collective_rows(plan: Plan) -> list[list[str]]:
    """A line a phase, kind and depth: how many, how often, and bytes received."""
    rows = [["collectives", "in loops", "places", "runs", "largest MiB", "GiB received", "over DCN"]]
    for part in (*plan.parts, *([plan.whole] if plan.whole else [])):
        program = part.compiled and part.compiled.program
        for kind in KINDS if program else ():
            found = [c for c in program.collectives if c.kind == kind] if program else []
            for depth in sorted({c.depth for c in found}):
                here = [c for c in found if c.depth == depth]
                rows.append([
                    f"{part.name}: {kind}", str(depth), str(sum(c.places for c in here)),
                    f"{sum(c.executed for c in here):.0f}", f"{max(c.bytes for c in here) / 2**20:.3g}",
                    f"{gib(sum(c.received for c in here)):.3g}", f"{gib(sum(c.received_dcn for c in here)):.3g}",
                ])  # fmt: skip
    return rows


def ranking(tried: Sequence[tuple[dict[str, int], Plan]], most: int) -> list[list[str]]:
    """The rows of a sweep: settings, verdict, memory and time of each, best first."""
    rows = [[*tried[0][0], "fits", "GiB a chip", "s, at best", "images/s", "by"]]
    for changes, plan in tried[:most]:
        peak = f"{gib(plan.largest[1]):.2f}" if plan.compiled else f">= {gib(plan.largest[1]):.2f}"
        verdict = "yes" if plan.fits and plan.compiled else "may" if plan.fits else "no"
        how = "compiler" if plan.compiled else "arithmetic"
        numbers = [str(value) for value in changes.values()]
        rows.append([*numbers, verdict, peak, f"{plan.seconds:.4g}", f"{plan.images_per_s:.3g}", how])
    return rows


def dump(values: Any) -> bytes:
    """JSON, indented."""
    return (json.dumps(values, indent=2) + "\n").encode()
