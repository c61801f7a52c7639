"""The outer loop, for every stage: data, state, restore, step, log, save."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uae_jax import checkpoint, hosts, runtime, sharding, storage
from uae_jax import config as configs
from uae_jax.data import sources
from uae_jax.errors import UserError
from uae_jax.metrics import Writer, read
from uae_jax.stages import Program
from uae_jax.stages.build import build


def run(config: Any, workdir: Path) -> None:
    """Runs the stages of a valid config (`config.validate`) one after the other, each from where it stopped.

    Raises:
      UserError: whatever the user can fix; another process is running in `workdir`.
    """
    environment = runtime.environment()
    if jax.process_count() > 1:  # it reads all of the code
        hosts.check_same(hosts.fingerprint(runtime.flatten(config.to_dict()), environment))
    with storage.only_user(workdir) if hosts.first() else nullcontext():
        run_stages(config, workdir, environment)


def run_stages(config: Any, workdir: Path, environment: dict[str, Any]) -> None:
    """`run`, in a workdir that is this run's alone."""
    mesh = sharding.make_mesh(config)
    hosts.acquaint(mesh)
    for stage in configs.stages(config):
        # RL is what a workdir is for; the stages of a cold start each have a folder in it.
        folder_of_stage = workdir if stage == "rl" else workdir / stage
        with storage.storage_errors(folder_of_stage):
            folder_of_stage.mkdir(parents=True, exist_ok=True)
        checkpoint.check_config(folder_of_stage, config.to_dict(), configs.MAY_DIFFER, configs.added_since())
        program = build(stage, config, workdir, mesh)
        checkpoint.write_config(folder_of_stage, config.to_dict())
        checkpoint.write_environment(folder_of_stage, environment)
        hosts.check_shared(folder_of_stage)
        if not loop(program, config, folder_of_stage, mesh):
            return


def restored(state: Any, saver: checkpoint.Checkpointer, config: Any) -> tuple[Any, str | None]:
    """Where a run starts: the first of these that there is.

    1. The newest checkpoint in its own workdir that is whole.
    2. `config.resume`: a checkpoint of another run, with its optimizer, step and key; what is trained must be the same.
    3. `state` as the stage built it: the weights that `config.weights` names,
    4. or, in a cold start, from nothing.

    Args:
      state: as the stage built it, on the mesh.
      saver: of the run's own checkpoints.
      config: of the run.

    Returns:
      The state, and what to tell of it (nothing of `state` itself).

    Raises:
      UserError: a checkpoint there is damaged, does not fit, or is of another configuration.
    """
    wanted = checkpoint.abstract(state)
    own = saver.restore_latest(wanted)
    if own is not None:
        state, step = own
        before = checkpoint.config_of(saver.directory, step)
        if before:
            place = f"checkpoint {saver.directory / str(step)}"
            checkpoint.refuse_another(place, before, config.to_dict(), configs.MAY_DIFFER, configs.added_since())
        return state, f"resuming {saver.directory.parent} at step {step}"
    if config.resume:
        folder, step = checkpoint.named(config.resume)
        state = checkpoint.restore(folder, step, wanted)
        before = checkpoint.config_of(folder, step)
        changed = (
            list(checkpoint.differences(before, config.to_dict(), configs.added_since()).values()) if before else []
        )
        return state, f"going on from {folder / str(step)}" + (
            f" with changes: {'; '.join(changed)}" if changed else ""
        )
    return state, None


def bad_in_a_row(counts: Sequence[int]) -> int:
    """How many updates have just been left out, from the count of all of them after each step."""
    row = 0
    while row + 1 < len(counts) and counts[-1 - row] > counts[-2 - row]:
        row += 1
    return row


def loop(program: Program, config: Any, workdir: Path, mesh: jax.sharding.Mesh) -> bool:
    """Trains one program to its last step; False if it stopped before (everything is saved)."""
    # ---- state: on the mesh, from the last checkpoint if there is one
    state = sharding.place(program.state, mesh, program.rules)
    if config.offload_optimizer:
        state = state.replace(opt_state=sharding.offloaded(state.opt_state))
    frozen = sharding.place(program.frozen, mesh, program.rules)
    size = program.batches.batch_size
    rows = sharding.local_rows(size, mesh)
    c = config.checkpoint
    keep = checkpoint.Keep(c.keep, c.keep_every, c.best, c.best_mode)
    with checkpoint.Checkpointer(workdir / "checkpoints", c.every, keep, config.to_dict()) as saver:
        state, told = restored(state, saver, config)
        first = int(state.step)
        compiled = sharding.jit_step(program.step, state, mesh)
        with Writer(workdir, program.steps, program.columns, resume_step=first) as writer, stop_requests() as stopped:
            # ---- what was there before
            if first == 0:
                program.evaluate(state, writer)
            elif first < program.steps and told:
                writer.message(told)
            # ---- training
            history = hosts.from_first(lambda: read(workdir)) if first else []
            bad = [row["bad_steps"] for row in history] or [int(state.bad_steps)]
            at, why = first, program.watch(history)[1] if history else None
            last = time.monotonic()
            batches = sources.prefetch(
                program.batches,
                first,
                first if why else program.steps,
                config.data.workers,
                lambda batch: sharding.place_rows(batch, rows, size, mesh),
                rows,
            )
            for at, batch in enumerate(batches, first + 1):
                state, metrics = compiled(state, frozen, batch)
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
                bad.append(metrics["bad_steps"])
                in_a_row = bad_in_a_row(bad)
                too_bad = 0 < config.max_bad_steps <= in_a_row
                stop = hosts.any_of(bool(stopped))  # all at the same step
                saver.save(at, state, bool(stop or why or done or too_bad), metrics)
                if too_bad:
                    writer.arrays(at, "bad_batch", **hosts.to_host(batch))
                    raise UserError(
                        f"{workdir}: the gradients of {in_a_row} steps in a row were not finite, and their updates left"
                        f" out: stopped at step {at}, with the last good weights saved, and the last batch in samples/"
                        f"bad_batch_{at:06d}.npz; lower the learning rate, or raise config.max_bad_steps"
                    )
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
