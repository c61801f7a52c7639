"""The outer loop, for every stage: data, state, restore, step, log, save."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uae_jax import checkpoint, hosts, runtime, sharding, storage
from uae_jax import config as configs
from uae_jax.data import sources
from uae_jax.metrics import Writer, read
from uae_jax.stages import Program
from uae_jax.stages.build import build


def run(config: Any, workdir: Path) -> None:
    """Runs the stages of a valid config (`config.validate`) one after the other, each from where it stopped.

    Raises:
      UserError: whatever the user can fix.
    """
    environment = runtime.environment()
    hosts.check_same(hosts.fingerprint(runtime.flatten(config.to_dict()), environment))
    mesh = sharding.make_mesh(config)
    hosts.acquaint(mesh)
    for stage in configs.stages(config):
        # RL is what a workdir is for; the stages of a cold start each have a folder in it.
        folder_of_stage = workdir if stage == "rl" else workdir / stage
        with storage.storage_errors(folder_of_stage):
            folder_of_stage.mkdir(parents=True, exist_ok=True)
        checkpoint.check_config(folder_of_stage, config.to_dict(), configs.MAY_DIFFER)
        program = build(stage, config, workdir, mesh)
        checkpoint.write_config(folder_of_stage, config.to_dict())
        checkpoint.write_environment(folder_of_stage, environment)
        hosts.check_shared(folder_of_stage)
        if not loop(program, config, folder_of_stage, mesh):
            return


def loop(program: Program, config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> bool:
    """Trains one program to its last step; False if it stopped before (everything is saved)."""
    # ---- state: on the mesh, from the last checkpoint if there is one
    state = sharding.place(program.state, mesh, program.rules)
    frozen = sharding.place(program.frozen, mesh, program.rules)
    size = program.batches.batch_size
    rows = sharding.local_rows(size, mesh)
    with checkpoint.Checkpointer(workdir / "checkpoints", config.checkpoint.every, config.checkpoint.keep) as saver:
        restored = saver.restore_latest(checkpoint.abstract(state))
        if restored is not None:
            state, _ = restored
        first = int(state.step)
        compiled = sharding.jit_step(program.step, state, mesh)
        with Writer(workdir, program.steps, program.columns, resume_step=first) as writer, stop_requests() as stopped:
            # ---- what was there before
            if first == 0:
                program.evaluate(state, writer)
            elif first < program.steps:
                writer.message(f"resuming {workdir} at step {first}")
            # ---- training
            history = hosts.from_first(lambda: read(workdir)) if first else []
            at, why = first, program.watch(history)[1] if history else None
            last = time.monotonic()
            batches = sources.prefetch(
                lambda step: program.batches.part(step, rows), first, first if why else program.steps
            )
            for at, batch in enumerate(batches, first + 1):
                state, metrics = compiled(state, frozen, sharding.place_rows(batch, rows, size, mesh))
                metrics = {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
                now = time.monotonic()
                tokens = metrics.pop("caption/tokens", None)
                metrics["throughput/images_per_s"] = size / (now - last)
                if tokens is not None:
                    metrics["throughput/tokens_per_s"] = tokens / (now - last)
                history.append({name: value for name, value in metrics.items() if name.startswith("tower/")})
                watched, why = program.watch(history)
                metrics |= watched
                done = at == program.steps
                if config.eval.every and (at % config.eval.every == 0 or done or why):
                    metrics |= program.evaluate(state, writer)
                    now = time.monotonic()
                last = now
                writer.write(at, metrics)
                stop = hosts.any_of(bool(stopped))  # all at the same step
                saver.save(at, state, force=bool(stop or why or done))
                if why:
                    break
                if stop and not done:
                    writer.message(f"stopped at step {at} of {program.steps}; the same command continues")
                    return False
            # ---- what it came to
            if why:
                writer.message(f"stopped at step {at} of {program.steps}: {why}")
            program.finish(state, writer)
    return not why


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that fills when the process is asked to end (SIGTERM, Ctrl-C); a second Ctrl-C ends it at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
