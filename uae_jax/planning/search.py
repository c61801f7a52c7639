"""Plans a config on one mesh, or tries meshes and microbatches: ranked by arithmetic, the best ones compiled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from uae_jax import sharding
from uae_jax.errors import UserError
from uae_jax.planning import abstract, compiler, flops, phases, roofline
from uae_jax.planning import topology as topologies
from uae_jax.planning.abstract import Abstract
from uae_jax.planning.flops import Work
from uae_jax.planning.phases import Phase
from uae_jax.planning.report import Plan, Result
from uae_jax.planning.topology import Topology

COMPILED_CANDIDATES = 3

Say = Callable[[str], None]


class Options(NamedTuple):
    """What the command line asks for besides config and machine."""

    name: str = ""  # of the config
    whole: bool = False  # compile the step as one program, too
    price: float = 0.0  # of a chip, an hour


def plan(config: Any, topology: Topology, options: Options, say: Say) -> Plan:
    """Compiles a config for a machine, part by part, unless what stays on a chip is already too much.

    Raises:
      UserError: the config cannot be planned, or does not divide over the machine.
    """
    run = abstract.build(config, sharding.make_mesh(config, topologies.devices(topology)))
    return compiled(reckoned(run, counted(run), topology, options), run, options, say)


class Counted(NamedTuple):
    """What does not depend on the layout."""

    work: dict[str, Work]  # of each part
    handed_on: float  # bytes a chip


def counted(run: Abstract) -> Counted:
    """Traces the parts and counts their work."""
    parts, images, rl = phases.parts(run), run.config.data.batch_size, run.config.rl
    known = flops.Known(rl.max_tokens - 1, frozenset((b, rl.group_size) for b in (images, images // rl.microbatches)))
    return Counted({phase.name: phase.work(known) for phase in parts}, _handed_on(parts))


def reckoned(run: Abstract, found: Counted, topology: Topology, options: Options) -> Plan:
    """The plan by arithmetic alone; of `run`, only config, mesh and layouts are read."""
    config, state = run.config, run.state
    domains, fsdp = topology.domains, dict(run.mesh.shape).get("fsdp", 1)
    trained = sum(float(x.size) * 4 for x in jax.tree.leaves(state.params))
    results = []
    for name, work in found.work.items():
        load = roofline.reckoned_load(name, work, topology.chips, fsdp, domains, trained)
        results.append(Result(name, work, load, roofline.estimate(load, topology.chip), None))
    sample = found.work["sample"]
    return Plan(
        config_name=options.name,
        topology=topology,
        mesh=dict(run.mesh.shape),
        images=config.data.batch_size,
        tokens=config.data.batch_size * config.rl.group_size * config.rl.max_tokens,
        resident={
            "frozen weights": abstract.bytes_per_chip(run.frozen),
            "trained parameters": abstract.bytes_per_chip(state.params),
            "optimizer": abstract.bytes_per_chip((state.opt_state, state.ema)),
        },
        batch=found.handed_on,
        held={"cache": sample.carried / topology.chips, "decode view": sample.held},
        parts=results,
        whole=None,
        stand_in=run.stand_in,
        price=options.price,
    )


def _handed_on(parts: list[Phase]) -> float:
    """Bytes a chip of the batch as the parts see it, at most: images, captions, redraws."""
    return max(
        sum(abstract.bytes_per_chip(x) for x, batch in zip(part.arguments, part.with_batch, strict=True) if batch)
        for part in parts
    )


def compiled(found: Plan, run: Abstract, options: Options, say: Say) -> Plan:
    """The same plan after compiling."""
    topology = found.topology
    if not topologies.compiles(topology) or sum(found.resident.values()) > topology.chip.hbm:
        return found

    def one(phase: Phase, work: Work) -> Result:
        say(f"compiling {phase.name} for {topology}")
        made = compiler.compile_phase(phase, run.mesh)
        load = roofline.compiled_load(work, made, topology.chips)
        return Result(phase.name, work, load, roofline.estimate(load, topology.chip), made)

    parts = [one(phase, before.work) for phase, before in zip(phases.parts(run), found.parts, strict=True)]
    whole = None
    if options.whole:
        total = functools.reduce(Work.plus, (part.work for part in parts))
        whole = one(phases.whole(run), total)
    return found._replace(parts=parts, whole=whole)


class Candidate(NamedTuple):
    """A mesh and a number of microbatches, planned."""

    changes: dict[str, int]  # of config.mesh and rl.microbatches
    plan: Plan


def sweep(config: Any, topology: Topology, options: Options, say: Say) -> list[Candidate]:
    """All ways to split the chips over data and fsdp with all microbatches that divide, best first.

    The best three by arithmetic are compiled; of those, what fits comes first, then the fastest.

    Raises:
      UserError: the batch divides over the chips in no way.
    """
    devices = topologies.devices(topology)
    runs: dict[int, tuple[Abstract, Counted]] = {}
    ranked, problem = [], None
    for changes in _candidates(config, topology.chips):
        changed = config.copy_and_resolve_references()
        changed.mesh.data, changed.mesh.fsdp = changes["mesh.data"], changes["mesh.fsdp"]
        parts = changed.rl.microbatches = changes["rl.microbatches"]
        try:
            mesh = sharding.make_mesh(changed, devices)
        except UserError as error:
            problem = error
            continue
        if parts not in runs:
            run = abstract.build(changed, mesh)
            runs[parts] = run, counted(run)
        run, work = runs[parts]
        there = run._replace(
            mesh=mesh, state=abstract.placed(run.state, mesh), frozen=abstract.placed(run.frozen, mesh)
        )
        ranked.append((Candidate(changes, reckoned(there, work, topology, options)), changed, mesh))
    if not ranked:
        raise problem or UserError(f"no mesh of {topology.chips} chips divides config.data.batch_size")
    ranked.sort(key=lambda found: _order(found[0]))
    best = [
        Candidate(candidate.changes, compiled(candidate.plan, abstract.build(changed, mesh), options, say))
        for candidate, changed, mesh in ranked[:COMPILED_CANDIDATES]
    ]
    return sorted(best, key=_order) + [candidate for candidate, *_ in ranked[COMPILED_CANDIDATES:]]


def _order(candidate: Candidate) -> tuple[bool, float, float]:
    found = candidate.plan
    return not found.fits, found.seconds, found.largest[1]


def _candidates(config: Any, chips: int) -> list[dict[str, int]]:
    """Settings to try: every split of the chips, every number of microbatches."""
    batch = config.data.batch_size
    splits = [(data, chips // data) for data in range(1, chips + 1) if chips % data == 0]
    microbatches = [m for m in range(1, batch + 1) if batch % m == 0 and (batch // m) % chips == 0]
    return [{"mesh.data": data, "mesh.fsdp": fsdp, "rl.microbatches": m} for data, fsdp in splits for m in microbatches]
