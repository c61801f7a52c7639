"""The parts of the step (`step.make_step`), each as a function of its own with abstract arguments, and the whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uae_jax import grpo, sharding, step
from uae_jax.models.janus.model import Janus
from uae_jax.planning import abstract, flops
from uae_jax.planning.abstract import Abstract
from uae_jax.umm import Trajectory

WHOLE = "step"


class Phase(NamedTuple):
    """Something to compile."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # abstract, with their layout
    with_batch: tuple[bool, ...]  # for each argument, whether it has a batch axis
    mesh: jax.sharding.Mesh
    known: flops.Known
    times: int = 1  # runs a step: `config.rl.rollout_microbatches`
    updates: bool = False  # the first argument is the state, which is donated

    def lower(self) -> Any:
        """As `jax.jit(...).lower` gives it."""
        if self.updates:
            return sharding.jit_step(self.function, self.arguments[0], self.mesh).lower(*self.arguments)
        return jax.jit(self.function).lower(*self.arguments)

    def work(self) -> flops.Work:
        """The work of one step."""

        def function(first: Any, *rest: Any) -> Any:
            return self.function(sharding.fetched(first), *rest)  # a state, as `jit_step` does

        jaxpr = jax.make_jaxpr(function)(*self.arguments)
        leaves = [len(jax.tree.leaves(argument)) for argument in self.arguments]
        with_batch = [flag for flag, n in zip(self.with_batch, leaves, strict=True) for _ in range(n)]
        return flops.Work().plus(flops.count(jaxpr, with_batch, self.known), self.times)


def parts(run: Abstract) -> list[Phase]:
    """sample, redraw, score and update, in order; the results of one are arguments of the next.

    The first three are those of one of the rollout's microbatches, as many of which as there are make a step.
    """
    config, family, mesh = run.config, run.family, run.mesh
    times = config.rl.rollout_microbatches
    b, g, side = config.data.batch_size // times, config.rl.group_size, config.data.image_size
    rows = frozenset((images, g) for images in (b, config.data.batch_size // config.rl.microbatches))
    codes = run.system.modules.config.vq.num_patches**2 if isinstance(run.system.modules, Janus) else 1
    params = run.state.params

    def shapes(batch: int) -> tuple[Any, Any]:
        images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
        keys = jax.eval_shape(lambda: step.sample_keys(jax.random.key(0), jnp.int32(0), batch, g))
        return abstract.batched(images, mesh), abstract.batched(keys, mesh)

    def score(images: jax.Array, redrawn: jax.Array, trajectory: Trajectory, frozen: Any) -> tuple[Any, ...]:
        scores = step.score(
            images,
            redrawn,
            trajectory,
            frozen,
            towers=run.system.towers,
            config=config,
            end_token=run.system.prompts.end_token,
            automaton=run.system.automaton,
        )
        settings = {"eps": config.rl.advantage_eps, "scale_by_std": config.rl.scale_by_std}
        return scores, grpo.advantages(scores.reward, scores.valid, **settings)[0]

    def update(state: Any, frozen: Any, images: jax.Array, trajectory: Trajectory, *rest: jax.Array) -> Any:
        return step.update(
            state, frozen, images, trajectory, *rest, family=family, optimizer=run.optimizer, config=config
        )

    def phase(name: str, function: Any, trips: int, *arguments: tuple[Any, bool], **more: Any) -> Phase:
        values, with_batch = zip(*arguments, strict=True)
        return Phase(name, function, values, with_batch, mesh, flops.Known(trips, rows), **more)

    images, keys = shapes(b)
    weights = (params, False), (run.frozen, False)
    sample = phase(
        "sample", family.generate, config.rl.max_tokens - 1, *weights, (images, True), (keys, True), times=times
    )  # fmt: skip
    captions = abstract.batched(jax.eval_shape(family.generate, *sample.arguments), mesh, group=True)
    redraw = phase(
        "redraw", family.redraw, codes - 1, *weights, (captions, True), (images, True), (keys, True), times=times
    )
    redrawn, drawn = jax.eval_shape(redraw.function, *redraw.arguments)
    redrawn = abstract.batched(redrawn, mesh, group=True, spare=True)
    trajectory = {"caption": captions} | abstract.batched(drawn, mesh, group=True)
    scoring = phase(
        "score", score, 1, (images, True), (redrawn, True), (trajectory, True), (run.frozen, False), times=times
    )

    def of_step(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] * times, *x.shape[1:]), x.dtype)

    scores, advantage = jax.eval_shape(scoring.function, *scoring.arguments)
    batch = jax.tree.map(of_step, (trajectory, advantage, scores.valid))
    updating = phase(
        "update", update, 1, (run.state, False), weights[1], (shapes(b * times)[0], True),
        *((x, True) for x in abstract.batched(batch, mesh, group=True)), updates=True,
    )  # fmt: skip
    return [sample, redraw, scoring, updating]


def whole(run: Abstract) -> Phase:
    """The step as runs compile it."""
    function = step.make_step(
        run.config,
        run.family,
        run.system.towers,
        run.optimizer,
        end_token=run.system.prompts.end_token,
        automaton=run.system.automaton,
        mesh=run.mesh,
    )
    side = run.config.data.image_size
    images = jax.ShapeDtypeStruct((run.config.data.batch_size, side, side, 3), jnp.uint8)
    batch = {"image": abstract.batched(images, run.mesh)}
    arguments = run.state, run.frozen, batch
    return Phase(WHOLE, function, arguments, (False, False, True), run.mesh, flops.Known(1), updates=True)
