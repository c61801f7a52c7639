"""The parts of the step (`step.make_step`), each as a function of its own with abstract arguments, and the whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uae_jax import grpo, step
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
    donate: tuple[int, ...] = ()

    def lower(self) -> Any:
        """As `jax.jit(...).lower` gives it."""
        return jax.jit(self.function, donate_argnums=self.donate).lower(*self.arguments)

    def work(self, known: flops.Known) -> flops.Work:
        """The work of one call."""
        jaxpr = jax.make_jaxpr(self.function)(*self.arguments)
        leaves = [len(jax.tree.leaves(argument)) for argument in self.arguments]
        with_batch = [flag for flag, n in zip(self.with_batch, leaves, strict=True) for _ in range(n)]
        return flops.count(jaxpr, with_batch, known)


def parts(run: Abstract) -> list[Phase]:
    """sample, redraw, score and update, in order; the results of one are arguments of the next."""
    config, family, mesh = run.config, run.family, run.mesh
    b, g, side = config.data.batch_size, config.rl.group_size, config.data.image_size
    params = run.state.params
    images = abstract.batched(jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32), mesh)
    keys = abstract.batched(jax.eval_shape(lambda: step.sample_keys(jax.random.key(0), jnp.int32(0), b, g)), mesh)

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

    sample = Phase("sample", family.generate, (params, run.frozen, images, keys), (False, False, True, True))
    captions = abstract.batched(jax.eval_shape(sample.function, *sample.arguments), mesh)
    arguments = params, run.frozen, captions, images, keys
    redraw = Phase("redraw", family.redraw, arguments, (False, False, True, True, True))
    redrawn = abstract.batched(jax.eval_shape(redraw.function, *redraw.arguments), mesh)
    trajectory = {"caption": captions}
    scoring = Phase("score", score, (images, redrawn, trajectory, run.frozen), (True, True, True, False))
    scores, advantage = abstract.batched(jax.eval_shape(scoring.function, *scoring.arguments), mesh)
    arguments = run.state, run.frozen, images, trajectory, advantage, scores.valid
    updating = Phase("update", update, arguments, (False, False, True, True, True, True), donate=(0,))
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
    return Phase(WHOLE, function, (run.state, run.frozen, batch), (False, False, True), donate=(0,))
