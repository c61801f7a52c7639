"""Where the time of a step goes: sample, redraw, score and update, compiled apart, and the one program of them all.

    python -m benchmarks.phases --config=configs/tiny.py [--config.FIELD=VALUE]

Prints median and spread over repeated runs after a warm-up, on the config's own data and weights.
"""

import statistics
import sys
import time
from typing import Any

from uae_jax import main as program
from uae_jax import runtime

REPEATS = 10


def timed(function: Any, *arguments: Any, donated: bool = False) -> tuple[Any, list[float]]:
    """The last result, and seconds of each run after the first.

    Args:
      donated: the first argument is used up, and the first result takes its place.
    """
    import jax

    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        result = jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
        if donated:
            arguments = (result[0], *arguments[1:])
    return result, seconds[1:]


def measure(run: Any, state: Any, frozen: Any, images: Any) -> dict[str, tuple[Any, Any, list[float]]]:
    """Compiles and times the phases of a run on real arrays, each on what the one before it gave.

    Args:
      run: `planning.abstract.Abstract`.
      state: used up.
      images: uint8 [b, H, W, 3].

    Returns:
      {name: (phase, compiled, seconds)}; seconds of all the runs that a step makes of it (`Phase.times`).
    """
    import jax
    import jax.numpy as jnp

    from uae_jax import step
    from uae_jax.planning import phases

    sample, redraw, score, update = phases.parts(run)
    times, found = sample.times, {}

    def go(phase: Any, *arguments: Any) -> Any:
        compiled = phase.lower().compile()
        result, seconds = timed(compiled, *arguments, donated=phase.updates)
        found[phase.name] = phase, compiled, [phase.times * value for value in seconds]
        return result

    whole = images.astype(jnp.float32) / 255.0
    keys = step.sample_keys(state.key, state.step, len(images), run.config.rl.group_size)
    part, part_keys = (
        jax.device_put(x[: len(x) // times], a.sharding)
        for x, a in zip((whole, keys), sample.arguments[2:], strict=True)
    )
    captions = go(sample, state.params, frozen, part, part_keys)
    redrawn, drawn = go(redraw, state.params, frozen, captions, part, part_keys)
    trajectory = {"caption": captions} | drawn
    scores, advantage = go(score, part, redrawn, trajectory, frozen)
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * times), (trajectory, advantage, scores.valid))
    repeated = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), repeated, update.arguments[3:])
    state = go(update, state, frozen, whole, *repeated)[0]
    go(phases.whole(run), state, frozen, {"image": images})
    return found


def main(arguments: list[str]) -> None:
    """Times the phases of one config."""
    config = runtime.parse(program.FLAGS, arguments)
    runtime.prepare()
    import jax
    from rich.console import Console
    from rich.table import Table

    from uae_jax import sharding, system
    from uae_jax.planning import abstract
    from uae_jax.stages import rl

    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    state, optimizer = rl.start(config, built)
    state = sharding.place(state, mesh, built.rules)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, built.frozen))
    run = abstract.Abstract(config, mesh, built, built.family(config, mesh), optimizer, *shapes, stand_in=False)
    batches, _, _ = rl.load_data(config)
    batch = sharding.place_batch({"image": batches[0]["image"]}, mesh)
    device = jax.devices()[0].device_kind
    table = Table("phase", "median ms", "min ms", "max ms", title=f"{device}, {len(batch['image'])} images")
    for name, (_, _, values) in measure(run, state, built.frozen, batch["image"]).items():
        table.add_row(name, *(f"{1e3 * f(values):.1f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
