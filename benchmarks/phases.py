"""Where the time of a step goes: rollout, redraw, score, update, compiled apart, and the one program of them all.

    python -m benchmarks.phases --config=configs/tiny.py [--config.FIELD=VALUE]

Prints median and spread over repeated runs after a warm-up, on the config's own data and weights.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from uae_jax import main as program
from uae_jax import runtime

REPEATS = 10


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, list[float]]:
    """The result, and seconds of each run after the first."""
    import jax

    result = jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - begin)
    return result, seconds


def main(arguments: list[str]) -> None:
    """Times the phases of one config."""
    config = runtime.parse(program.FLAGS, arguments)
    runtime.prepare()
    import jax
    import jax.numpy as jnp
    from rich.console import Console
    from rich.table import Table

    from uae_jax import grpo, sharding, step, system
    from uae_jax.stages import rl

    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    family = built.family(config, mesh)
    state, optimizer = rl.start(config, built)
    batches, _, _ = rl.load_data(config)
    batch = sharding.place_batch({"image": batches[0]["image"]}, mesh)
    images = batch["image"].astype(jnp.float32) / 255.0
    keys = step.sample_keys(state.key, state.step, len(images), config.rl.group_size)
    options = {"config": config, "end_token": built.prompts.end_token, "automaton": built.automaton}

    rollout = jax.jit(family.generate)
    redraw = jax.jit(family.redraw)
    score = jax.jit(lambda *args: step.score(*args, towers=built.towers, **options))
    update = jax.jit(lambda *args: step.update(*args, family=family, optimizer=optimizer, config=config))
    whole = jax.jit(
        step.make_step(
            config, family, built.towers, optimizer, mesh=mesh, **{k: v for k, v in options.items() if k != "config"}
        )
    )

    frozen, seconds = built.frozen, {}
    captions, seconds["rollout"] = timed(rollout, state.params, frozen, images, keys)
    (redrawn, drawn), seconds["redraw"] = timed(redraw, state.params, frozen, captions, images, keys)
    trajectory = {"caption": captions} | drawn
    scores, seconds["score"] = timed(score, images, redrawn, trajectory, frozen)
    advantage, _ = grpo.advantages(scores.reward, scores.valid)
    _, seconds["update"] = timed(update, state, frozen, images, trajectory, advantage, scores.valid)
    _, seconds["step"] = timed(whole, state, frozen, batch)

    table = Table(
        "phase", "median ms", "min ms", "max ms", title=f"{jax.devices()[0].device_kind}, {len(images)} images"
    )
    for name, values in seconds.items():
        table.add_row(name, *(f"{1e3 * f(values):.1f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    runtime.run(main, sys.argv)
