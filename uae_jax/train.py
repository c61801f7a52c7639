"""The outer loop, for every stage: data, state, restore, step, log, save."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uae_jax import checkpoint, sharding, storage
from uae_jax import config as configs
from uae_jax.data import sources
from uae_jax.metrics import Writer
from uae_jax.stages import Program
from uae_jax.stages.build import build


def run(config: Any, workdir: Path) -> None:
    """Runs the stages of a valid config (`config.validate`) one after the other, each from where it stopped.

    Raises:
      UserError: whatever the user can fix.
    """
    mesh = sharding.make_mesh(config)
    for stage in configs.stages(config):
        # RL is what a workdir is for; the stages of a cold start each have a folder in it.
        folder_of_stage = workdir if stage == "rl" else workdir / stage
        with storage.storage_errors(folder_of_stage):
            folder_of_stage.mkdir(parents=True, exist_ok=True)
        checkpoint.check_config(folder_of_stage, config.to_dict(), configs.MAY_DIFFER)
        program = build(stage, config, workdir, mesh)
        checkpoint.write_config(folder_of_stage, config.to_dict())
        if not loop(program, config, folder_of_stage, mesh):
            return


def loop(program: Program, config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> bool:
    """Trains one program to its last step; False if it was asked to stop before (everything is saved)."""
    # ---- state: on the mesh, from the last checkpoint if there is one
    state = sharding.place(program.state, mesh, program.rules)
    frozen = sharding.place(program.frozen, mesh, program.rules)
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
            last = time.monotonic()
            for at, batch in enumerate(sources.prefetch(program.batches, first, program.steps), first + 1):
                state, metrics = compiled(state, frozen, sharding.place_batch(batch, mesh))
                metrics = {name: np.asarray(value).item() for name, value in jax.device_get(metrics).items()}
                now = time.monotonic()
                images, tokens = len(batch["image"]), metrics.pop("caption/tokens", None)
                metrics["throughput/images_per_s"] = images / (now - last)
                if tokens is not None:
                    metrics["throughput/tokens_per_s"] = tokens / (now - last)
                if config.eval.every and (at % config.eval.every == 0 or at == program.steps):
                    metrics |= program.evaluate(state, writer)
                    now = time.monotonic()
                last = now
                writer.write(at, metrics)
                stop = at < program.steps and bool(stopped)
                saver.save(at, state, force=stop or at == program.steps)
                if stop:
                    writer.message(f"stopped at step {at} of {program.steps}; the same command continues")
                    return False
            # ---- what it came to
            program.finish(state, writer)
    return True


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
