"""Plans a config on one mesh, or tries meshes and microbatches: ranked by arithmetic, the best ones compiled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uae_jax import sharding
from uae_jax.errors import UserError
from uae_jax.models.janus.model import Janus
from uae_jax.planning import abstract, compiler, phases, roofline
from uae_jax.planning import topology as topologies
from uae_jax.planning.abstract import Abstract
from uae_jax.planning.flops import Work
from uae_jax.planning.phases import Phase
from uae_jax.planning.report import Plan, Result
from uae_jax.planning.topology import Topology

COMPILED_CANDIDATES = 3
MOST_TENSOR = 8  # more than captioners have key heads

Say = Callable[[str], None]


class Options(NamedTuple):
    """What the command line asks for besides config and machine."""

    name: str = ""  # of the config
    parts: tuple[str, ...] = ("sample", "redraw", "score", "update")  # to compile
    whole: bool = False  # compile the step as one program, too
    price: float = 0.0  # of a chip, an hour


def plan(config: Any, topology: Topology, options: Options, say: Say) -> Plan:
    """Compiles a config for a machine, part by part, unless what stays on a chip is already too much.

    Raises:
      UserError: the config cannot be planned, or does not divide over the machine.
    """
    run = abstract.build(config, sharding.make_mesh(config, topologies.devices(topology)))
    parts = phases.parts(run)
    return compiled(reckoned(run, counted(parts), topology, options), run, parts, options, say)


class Counted(NamedTuple):
    """What does not depend on the layout."""

    work: dict[str, Work]  # of each part
    handed_on: float  # bytes a chip of the batch as the parts see it, at most: images, captions, redraws

    def parted(self, rollout: float, update: float) -> "Counted":
        """With so many times the microbatches: weights are read as often, the cache of one is so much smaller."""

        def of(work: Work, times: float) -> Work:
            return work._replace(
                whole_flops=work.whole_flops * times,
                whole_bytes=work.whole_bytes * times,
                carried=work.carried / times,
            )

        work = {name: of(x, update if name == "update" else rollout) for name, x in self.work.items()}
        return Counted(work, self.handed_on / rollout)


def counted(parts: list[Phase]) -> Counted:
    """Counts the work of the parts, and what they hand on."""
    handed_on = max(
        sum(abstract.bytes_per_chip(x) for x, batch in zip(part.arguments, part.with_batch, strict=True) if batch)
        for part in parts
    )
    return Counted({phase.name: phase.work() for phase in parts}, handed_on)


def reckoned(run: Abstract, found: Counted, topology: Topology, options: Options) -> Plan:
    """The plan by arithmetic alone; of `run`, only config, sizes, mesh and layouts are read."""
    config, state, rl = run.config, run.state, run.config.rl
    modules = run.system.modules
    model = modules if isinstance(modules, Janus) else modules.captioner
    sizes, shape = run.mesh.shape, topology.chips
    layout = roofline.Layout(
        chips=shape,
        fsdp=sizes["fsdp"],
        tensor=sizes["tensor"],
        domains=topology.domains,
        share=abstract.share_used(run.frozen["start"], run),
        trained=sum(float(x.size) * 4 for x in jax.tree.leaves(state.params)),
    )
    captions = config.data.batch_size * rl.group_size
    codes = model.config.vq.num_patches**2 if isinstance(model, Janus) else 0
    drawn = captions * codes * (1 if config.redraw.guidance == 1.0 else 2)
    # Passes over a sequence: written once; scored before the update, by the start, and forward, backward and again.
    tokens = {"sample": captions * rl.max_tokens, "redraw": drawn, "score": 0}
    tokens["update"] = (captions * rl.max_tokens + (drawn if config.train != "encoder" else 0)) * (
        1 + bool(rl.beta) + 3 * rl.inner_epochs
    )
    # Two sums a layer: behind attention and behind the MLP.
    a_token = 2.0 * model.config.text.num_layers * model.config.text.hidden_size * jnp.dtype(config.dtype).itemsize
    results = []
    for name, work in found.work.items():
        load = roofline.reckoned_load(
            work, layout, name in ("sample", "update") or bool(work.held), name == "update", tokens[name] * a_token
        )
        results.append(Result(name, work, load, roofline.estimate(load, topology.chip), None))
    # Key heads that tensor does not divide are cached by all its chips.
    copies = 1 if model.config.text.num_kv_heads % layout.tensor == 0 else layout.tensor
    memory = {name: (work.carried * copies / shape, work.held * layout.share) for name, work in found.work.items()}
    writing = max(memory, key=lambda name: sum(memory[name]))
    return Plan(
        config_name=options.name,
        topology=topology,
        mesh=dict(sizes),
        images=config.data.batch_size,
        tokens=captions * rl.max_tokens,
        resident={
            "frozen weights": abstract.bytes_per_chip(run.frozen),
            "trained parameters": abstract.bytes_per_chip(state.params),
            "optimizer": abstract.bytes_per_chip((state.opt_state, state.ema)),
        },
        batch=found.handed_on,
        writing=writing,
        held=dict(zip(("cache", "decode view"), memory[writing], strict=True)),
        parts=results,
        whole=None,
        stand_in=run.stand_in,
        on_chip=run.on_chip,
        price=options.price,
    )


def compiled(found: Plan, run: Abstract, parts: list[Phase], options: Options, say: Say) -> Plan:
    """The same plan after compiling."""
    topology = found.topology
    if not topologies.compiles(topology) or sum(found.resident.values()) > topology.chip.hbm:
        return found

    def one(phase: Phase, work: Work) -> Result:
        say(f"compiling {phase.name} for {topology}")
        made = compiler.compile_phase(phase)
        say(f"{phase.name}: {compiler.gib(made.beyond_arguments):.2f} GiB a chip beside weights, {made.seconds:.0f} s")
        load = roofline.compiled_load(work, made, topology.chips, phase.times)
        return Result(phase.name, work, load, roofline.estimate(load, topology.chip), made)

    results = [
        one(phase, before.work) if phase.name in options.parts else before
        for phase, before in zip(parts, found.parts, strict=True)
    ]
    whole = None
    if options.whole:
        total = functools.reduce(Work.plus, (part.work for part in results))
        whole = one(phases.whole(run), total)
    return found._replace(parts=results, whole=whole)


class Candidate(NamedTuple):
    """A mesh and numbers of microbatches, planned."""

    changes: dict[str, int]  # of the config
    plan: Plan


def sweep(config: Any, topology: Topology, options: Options, say: Say) -> list[Candidate]:
    """All ways to split the chips over data, fsdp and tensor with all microbatches that divide, best first.

    The best three by arithmetic are compiled; of those, what fits comes first, then the fastest.

    Raises:
      UserError: the batch divides over the chips in no way.
    """
    devices = topologies.devices(topology)
    work: Counted | None = None
    ranked, problem = [], None
    for split in _splits(topology):
        changed = config.copy_and_resolve_references()
        changed.mesh.update(split)
        changed.rl.microbatches = changed.rl.rollout_microbatches = 1
        try:
            mesh = sharding.make_mesh(changed, devices)
        except UserError as error:
            problem = error
            continue
        run = abstract.build(changed, mesh)
        work = work or counted(phases.parts(run))
        for parts in _microbatches(config.data.batch_size):
            changed.rl.update(parts)
            try:
                sharding.check_batches(changed, mesh)
            except UserError:
                continue
            some = work.parted(parts["rollout_microbatches"], parts["microbatches"])
            changes = {f"mesh.{axis}": n for axis, n in split.items()} | {f"rl.{name}": n for name, n in parts.items()}
            ranked.append(Candidate(changes, reckoned(run, some, topology, options)))
    if not ranked:
        raise problem or UserError(f"no mesh of {topology.chips} chips divides config.data.batch_size")
    ranked.sort(key=_order)
    best = []
    for candidate in ranked[:COMPILED_CANDIDATES]:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(candidate.changes)
        best.append(Candidate(candidate.changes, plan(changed, topology, options, say)))
    return sorted(best, key=_order) + ranked[COMPILED_CANDIDATES:]


def _order(candidate: Candidate) -> tuple[bool, float, float]:
    found = candidate.plan
    return not found.fits, found.seconds, found.largest[1]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _splits(topology: Topology) -> list[dict[str, int]]:
    """Every split of the chips; slices are what they are."""
    chips = topology.chips // topology.slices
    return [
        {"slice": topology.slices, "data": data, "fsdp": chips // tensor // data, "tensor": tensor}
        for tensor in _divisors(chips)
        if tensor <= MOST_TENSOR
        for data in _divisors(chips // tensor)
    ]


def _microbatches(batch: int) -> list[dict[str, int]]:
    return [
        {"rollout_microbatches": rollout, "microbatches": update}
        for rollout in _divisors(batch)
        for update in _divisors(batch)
    ]
