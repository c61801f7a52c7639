"""Runs that are killed, stopped, starved and disturbed: each fault really happens, to a process that trains.

The program is as small as one can be, with the real loop, checkpoints, metrics and data; tests/test_main.py kills the
real one too.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices, tiny
from uae_jax import checkpoint, optimizers, runtime, sharding, train
from uae_jax.data import sources
from uae_jax.stages import Program, coldstart

STEPS, EVERY = 12, 2
SIZE = 200_000  # of what is trained: a save takes long enough to be hit


# ---- the run, in a process of its own. `forkserver` imports jax once for all of them.


def make_config(steps=STEPS, **changes):
    """Of a run that saves every second step."""
    fixed = {"checkpoint__every": EVERY, "eval__every": 1, "max_bad_steps": 3, "optimizer__decay": False}
    return tiny.config(Path("unused"), steps=steps, **fixed | changes)


def make_program(config, between=lambda at: None, poisoned=()):
    """A vector that learns the brightness of scenes; `between` is called after each step."""
    optimizer = optimizers.make(config.optimizer, optimizers.schedule(config.optimizer, config.steps))

    def loss(params, frozen, batch, key):
        noise = jax.random.normal(key, (SIZE,))
        value = ((params["w"] + 0.1 * noise - batch["image"].mean()) ** 2).mean()
        value *= jnp.where(jnp.isin(frozen["at"], jnp.asarray(poisoned, int)), jnp.nan, 1.0)
        return value, {"loss": value}

    update = coldstart.supervised_step(loss, optimizer)

    def evaluate(state, _writer):
        between(int(state.step))
        return {}

    return Program(
        state=coldstart.initial_state(jax.random.key(config.seed), {"w": jnp.zeros(SIZE)}, optimizer),
        frozen={},
        rules=((".*", sharding.Split.COPIED),),
        step=lambda state, frozen, batch: update(state, frozen | {"at": state.step + 1}, batch),
        batches=sources.batches(sources.ShapesSource(0, 100, 48), range(100), config.data.batch_size, config.seed),
        steps=config.steps,
        columns={"loss": ("loss", ".4f")},
        evaluate=evaluate,
        finish=lambda state, writer: None,
    )


def work(workdir, log, pipe, settings):
    """Trains as the command does, with its output in `log`."""
    os.environ.update(devices.environment(settings.pop("devices", 1)))
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    pause, full_at, poisoned = settings.pop("pause", 0.0), settings.pop("full_at", None), settings.pop("poisoned", ())

    def between(at):
        time.sleep(pause)
        if at == full_at:  # files may not grow any more, as on a full disk; the save before is complete
            while not (Path(workdir) / "checkpoints" / str(at - 1)).is_dir():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    restore = checkpoint.restore

    def told(*args):
        pipe.send("restoring")
        return restore(*args)

    def main(_arguments):
        runtime.prepare()
        checkpoint.restore = told
        train.build = lambda stage, config, workdir, mesh: make_program(config, between, poisoned)
        train.run(make_config(**settings), Path(workdir))

    pipe.send("started")
    runtime.run(main, [])
    sys.stdout.flush()


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "uae_jax.train", "tests.tiny", "pytest"])
    return context


class Run:
    """A run in another process, in `workdir`, with its output in workdir.log."""

    def __init__(self, context, workdir, **settings):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(str(workdir), str(self.log), theirs, settings), daemon=True)
        self.process.start()
        theirs.close()

    def until(self, happened, seconds=120):
        """Waits; whether the run was still going on then."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"nothing happened: {self.log.read_text()}"
            if not self.process.is_alive():
                return False
            time.sleep(0.001)
        return self.process.is_alive()

    def told(self, word):
        """Whether the process has sent `word`; all that came before is dropped."""
        try:
            while self.pipe.poll():
                if self.pipe.recv() == word:
                    return True
        except EOFError:
            pass
        return False

    def kill(self):
        self.process.kill()
        self.process.join()

    def end(self):
        """Waits for the end; the exit code and what was printed."""
        self.process.join(120)
        assert not self.process.is_alive(), self.log.read_text()
        return self.process.exitcode, self.log.read_text()


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("throughput/")} for row in rows]


def count(workdir):
    """Lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(workdir):
    """Whether a save is under way, or was when the process ended."""
    with contextlib.suppress(FileNotFoundError):
        return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())
    return False


def final(workdir, step=STEPS):
    """What was learnt, by the last checkpoint."""
    leaves = checkpoint.open_leaves(workdir / "checkpoints", step, "")
    return {name: leaves.read(name) for name in leaves.shapes}


def assert_as_uninterrupted(workdir, whole):
    assert lines(workdir) == lines(whole)
    found, expected = final(workdir), final(whole)
    assert found.keys() == expected.keys() and len(found) > 5
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], name)


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, output = Run(processes, workdir).end()
    assert code == 0, output
    assert [row["step"] for row in lines(workdir)] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in lines(workdir)}) == STEPS
    return workdir


# ---- killed


def reach(run, where, rng):
    """Waits for a random moment in a step, a save or a restore; whether the run was still going on then."""
    before = count(run.workdir)
    if where == "restore":
        alive = run.until(lambda: run.told("restoring"))
        time.sleep(rng.uniform(0, 0.02))
    elif where == "save":
        seen = rng.integers(1, 4)
        alive = run.until(lambda: count(run.workdir) >= before + seen) and run.until(lambda: saving(run.workdir))
        time.sleep(rng.uniform(0, 0.02))
    else:
        seen = rng.integers(1, 6)
        alive = run.until(lambda: count(run.workdir) >= before + seen)
        time.sleep(rng.uniform(0, 0.12))
    return alive


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_point_comes_out_as_the_uninterrupted_one(processes, whole, tmp_path, kills):
    rng = np.random.default_rng()
    landed = {"save": 0, "restore": 0, "step": 0}
    halves, runs, lost = 0, 0, 0
    workdir = tmp_path / "0"
    while sum(landed.values()) < kills:
        where = min(landed, key=lambda name: (landed[name], name != "save"))
        if where == "restore" and not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
            where = "step"  # there is nothing to restore yet
        run = Run(processes, workdir, pause=0.1)
        alive = reach(run, where, rng)
        if not alive:  # it came to its end before
            assert run.end()[0] == 0, run.log.read_text()
            assert_as_uninterrupted(workdir, whole)
            runs, workdir = runs + 1, tmp_path / str(runs + 1)
            continue
        run.kill()
        halves += saving(workdir)
        landed[where] += 1
        saved = checkpoint.newest_whole(workdir / "checkpoints") or 0
        lost = max(lost, count(workdir) - saved)
    code, output = Run(processes, workdir).end()
    assert code == 0 and "Traceback" not in output, output
    assert_as_uninterrupted(workdir, whole)
    assert halves > 0, "no kill fell into a save: the test tests nothing"
    print(f"{kills} kills {landed}, {halves} left half a save, {runs + 1} runs; at most {lost} steps done again")
    assert lost <= 2 * EVERY  # one save under way, and the steps since


def test_a_preemption_saves_ends_well_and_says_how_to_go_on(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    run = Run(processes, workdir, pause=0.05)
    assert run.until(lambda: count(workdir) >= 3)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.end()
    assert code == 0 and "the same command continues" in output, output
    done = count(workdir)
    assert done < STEPS and checkpoint.newest_whole(workdir / "checkpoints") == done  # nothing is done again
    assert Run(processes, workdir).end()[0] == 0
    assert_as_uninterrupted(workdir, whole)


def test_of_two_runs_in_one_workdir_the_second_refuses(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    first = Run(processes, workdir, pause=5)  # of which it has not done many when the second has started
    assert first.until(lambda: count(workdir) >= 1)
    code, output = Run(processes, workdir).end()
    assert code == 2 and "is in use by another run" in output and output.count("\n") == 1, output
    assert first.process.is_alive()
    first.kill()  # the lock goes with it
    assert Run(processes, workdir).end()[0] == 0
    assert_as_uninterrupted(workdir, whole)


# ---- storage


def test_a_disk_that_fills_up_stops_the_run_and_the_checkpoints_stand(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    code, output = Run(processes, workdir, full_at=5).end()
    assert code == 2 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith(f"error: cannot write {workdir}"), output
    assert "File too large" in output
    assert checkpoint.newest_whole(workdir / "checkpoints") == 4
    assert Run(processes, workdir).end()[0] == 0
    assert_as_uninterrupted(workdir, whole)


def test_a_file_system_without_room_does_the_same(processes, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for a checkpoint (three vectors) or two, and not for those that are kept and the one being written.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, output = Run(processes, disk / "run").end()
        assert code == 2 and "Traceback" not in output, output
        assert "No space left on device" in output.splitlines()[-1], output
        assert checkpoint.newest_whole(disk / "run" / "checkpoints") in (2, 4, 6)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert Run(processes, disk / "run").end()[0] == 0
        assert_as_uninterrupted(disk / "run", whole)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    largest = max((workdir / "checkpoints" / "12").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    code, output = Run(processes, workdir).end()
    assert code == 0, output
    assert "checkpoints/12 is damaged" in output and "resuming" in output
    assert_as_uninterrupted(workdir, whole)


# ---- where a run starts


def test_the_order_in_which_a_run_looks_for_its_start(processes, whole, tmp_path):
    half, other, own = tmp_path / "half", tmp_path / "other", tmp_path / "own"
    assert Run(processes, half, steps=6).end()[0] == 0  # 4. from nothing
    assert lines(half) == lines(whole)[:6]
    code, output = Run(processes, other, resume=str(half), max_bad_steps=4).end()  # 2. another run
    assert code == 0 and f"going on from {half}/checkpoints/6" in output and "max_bad_steps was 3, now 4" in output
    assert lines(other) == lines(whole)[6:]
    np.testing.assert_array_equal(final(other)["params/w"], final(whole)["params/w"])
    code, output = Run(processes, own, steps=4).end()
    assert code == 0, output
    shutil.rmtree(half / "checkpoints" / "6")
    settings = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(settings | {"resume": str(half)}))
    for folder in (own / "checkpoints").iterdir():  # what they hold says so too
        (folder / "default" / "record.json").unlink()
    code, output = Run(processes, own, resume=str(half)).end()  # 1. its own before another's
    assert code == 0 and f"resuming {own} at step 4" in output, output
    assert lines(own) == lines(whole)
    code, output = Run(processes, tmp_path / "none", resume=str(tmp_path / "nothing")).end()
    assert code == 2 and "config.resume" in output


def test_a_run_goes_on_with_another_number_of_devices(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    assert Run(processes, workdir, steps=6).end()[0] == 0
    code, output = Run(processes, workdir, devices=2).end()
    assert code == 0, output
    for found, expected in zip(lines(workdir), lines(whole), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-6)


def test_the_workdir_of_an_older_version_is_taken_over_or_refused(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    assert Run(processes, workdir, steps=6).end()[0] == 0
    before = json.loads((workdir / "config.json").read_text())
    del before["resume"], before["max_bad_steps"], before["checkpoint"]["keep_every"], before["rl"]["logit_chunk"]
    (workdir / "config.json").write_text(json.dumps(before))
    for folder in (workdir / "checkpoints").iterdir():
        (folder / "default" / "record.json").unlink()
    code, output = Run(processes, workdir).end()
    assert code == 0 and "without checksums: it is used unverified" in output, output
    assert_as_uninterrupted(workdir, whole)
    (workdir / "config.json").write_text(json.dumps(before | {"forgotten": 1}))
    code, output = Run(processes, workdir).end()
    assert code == 2 and "forgotten was 1, now '(absent)'" in output, output


# ---- numbers that are none


def test_a_loss_that_is_not_a_number_moves_nothing_and_too_many_stop_the_run(processes, whole, tmp_path):
    workdir = tmp_path / "run"
    code, output = Run(processes, workdir, poisoned=(2, 3, 6, 8, 9, 10, 11)).end()
    assert code == 2 and "Traceback" not in output, output
    assert "the gradients of 3 steps in a row were not finite" in output and "stopped at step 10" in output
    rows = lines(workdir)
    assert [row["bad_steps"] for row in rows] == [0, 1, 2, 2, 2, 3, 3, 4, 5, 6]
    assert [row["loss"] is None for row in rows] == [at in (2, 3, 6, 8, 9, 10) for at in range(1, 11)]
    kept = final(workdir, 10)
    assert kept["bad_steps"] == 6 and np.isfinite(kept["params/w"]).all()
    with np.load(workdir / "samples" / "bad_batch_000010.npz", allow_pickle=False) as batch:
        again = make_program(make_config()).batches[9]
        np.testing.assert_array_equal(batch["image"], again["image"])
    np.testing.assert_array_equal(kept["params/w"], final(workdir, 8)["params/w"])  # 9 and 10 moved nothing


def test_bad_steps_in_a_row_are_counted_over_an_interruption(processes, tmp_path):
    workdir = tmp_path / "run"
    settings = {"poisoned": (3, 4, 5, 6), "max_bad_steps": 4}
    run = Run(processes, workdir, pause=0.2, **settings)
    assert run.until(lambda: (workdir / "checkpoints" / "4").exists())  # after two of them
    run.kill()
    code, output = Run(processes, workdir, **settings).end()
    assert "resuming" in output and "at step 4" in output
    assert code == 2 and "of 4 steps in a row" in output and "stopped at step 6" in output, output


# ---- data that may only be read


def test_data_and_weights_are_only_read(weights, tmp_path):
    from PIL import Image

    from uae_jax import system
    from uae_jax.stages import rl

    for i, image in enumerate(tiny.scenes(4)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    places = [str(tmp_path), str(weights)]
    touched = []

    def watch(event, args):
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            writing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            paths = [args[0]] if writing else []
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime"):
            paths = args[:2]
        else:
            return
        touched.extend(p for p in map(str, paths) if watching and any(p.startswith(place) for place in places))

    watching = True
    sys.addaudithook(watch)  # for the life of the process: `watching` ends it
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        config = tiny.config(weights, data__source="folder", data__path=str(tmp_path), data__held_out=1)
        batches, held_out, _ = rl.load_data(config)
        assert batches[0]["image"].shape == (2, 48, 48, 3) and len(held_out) == 1
        system.load(config, sharding.make_mesh(config))
        assert touched == []
        with contextlib.suppress(OSError):
            open(tmp_path / "5.png", "w").close()
        assert touched == [str(tmp_path / "5.png")]  # the watch sees
    finally:
        watching = False
        tmp_path.chmod(0o755)
