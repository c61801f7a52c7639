"""Several processes that train as one, for real: on CPU, with virtual devices and gloo between them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_main import ROOT, arguments, lines, wait_for_line
from uae_jax import checkpoint, hosts, main, runtime, sharding
from uae_jax.data import sources
from uae_jax.errors import UserError

DEVICES = 4
HEARTBEAT = 20  # seconds; a busy machine lets a living process miss a shorter one


def start(flags, cache, devices, **environment):
    """The program on `devices` virtual devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "uae_jax.main", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_many(count, flags, cache, own=()):
    """`count` processes that share DEVICES devices; `own[i]` are further flags of process i."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = [*flags, f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    return [
        start([*common, f"--process_id={i}", *(own[i] if own else ())], cache, DEVICES // count) for i in range(count)
    ]


def ended(processes, seconds=240):
    """(exit code, output, errors) of each."""
    deadline, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=deadline - time.monotonic())
            found.append((process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(weights):
    """Weights split over two devices, batches over four."""
    return tiny.config(
        weights, steps=4, data__batch_size=4, data__held_out=8, eval__enabled=True, eval__every=2, eval__batch_size=4,
        eval__pictures=2, mesh__data=2, mesh__fsdp=2, checkpoint__every=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(config, cache, tmp_path_factory):
    """The workdir of a run of one process with all the devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((code, _, errors),) = ended([start(arguments(config, workdir), cache, DEVICES)])
    assert code == 0, errors
    return workdir


def assert_same_run(workdir, expected):
    """Metrics, evaluation and every leaf of the last checkpoint."""
    rows, wanted = lines(workdir), lines(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        for name, value in want.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    found, evaluation = (json.loads((path / "eval.json").read_text()) for path in (workdir, expected))
    for when in ("before", "after"):
        assert found[when]["captions"] == evaluation[when]["captions"]
        np.testing.assert_allclose(found[when]["reward"], evaluation[when]["reward"], atol=1e-5)
    step = checkpoint.latest_step(workdir / "checkpoints")
    assert step == checkpoint.latest_step(expected / "checkpoints") == len(rows)
    leaves, others = (checkpoint.open_leaves(path / "checkpoints", step, "") for path in (workdir, expected))
    assert leaves.shapes == others.shapes and len(leaves.shapes) > 20
    for name in leaves.shapes:
        np.testing.assert_allclose(leaves.read(name), others.read(name), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_and_stop_together(alone, config, cache, tmp_path, count):
    """Asked to stop at one process, all save at the same step; what they go on to is the run of one process."""
    flags = arguments(config, tmp_path / "run")
    processes = start_many(count, flags, cache)
    wait_for_line(processes[0], tmp_path / "run", 1)
    processes[-1].send_signal(signal.SIGTERM)
    for code, _, errors in ended(processes):
        assert code == 0, errors
    stopped = checkpoint.latest_step(tmp_path / "run" / "checkpoints")
    assert stopped == len(lines(tmp_path / "run"))
    if stopped < config.steps:
        done = ended(start_many(count, flags, cache))
        assert [code for code, _, _ in done] == [0] * count, done
        assert f"resuming {tmp_path / 'run'} at step {stopped}" in done[0][1]
        told = [line for _, output, _ in done[1:] for line in output.splitlines() if not line.startswith("[Gloo]")]
        assert not told  # the first alone tells
    assert_same_run(tmp_path / "run", alone)


def test_a_dead_process_ends_the_others(alone, config, cache, tmp_path):
    flags = [*arguments(config, tmp_path / "run"), "--config.steps=100000", "--config.eval.enabled=False"]
    flags += [f"--config.heartbeat_seconds={HEARTBEAT}"]
    processes = start_many(2, flags, cache)
    wait_for_line(processes[0], tmp_path / "run", 1)
    processes[1].kill()
    began = time.monotonic()
    (code, _, errors), _ = ended(processes, seconds=60)
    assert code != 0 and time.monotonic() - began < HEARTBEAT + 20
    assert "another task died" in errors or "error: " in errors, errors


def test_processes_that_would_differ_are_refused(config, cache, tmp_path):
    own = ([], ["--config.rl.beta=0.5"])
    for code, _, errors in ended(start_many(2, arguments(config, tmp_path / "run"), cache, own)):
        assert code == 2, errors
        line = errors.strip().splitlines()[-1]
        assert line.startswith("error: process 1 of 2 ") and "config.rl.beta is 0.5 there, 0.02 in process 0" in line
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_its_own_is_refused(config, cache, tmp_path):
    own = [[f"--workdir={tmp_path / name}"] for name in ("a", "b")]
    for code, _, errors in ended(start_many(2, arguments(config, tmp_path), cache, own)):
        assert code == 2 and "process 1 does not see" in errors and "--workdir" in errors


def test_a_fingerprint_tells_configs_code_and_flags_apart(monkeypatch):
    environment = {"jax": "1", "jaxlib": "2", "devices": {"kind": "cpu"}, "flags": {"XLA_FLAGS": "--a"}}
    mine = hosts.fingerprint({"rl.beta": 0.1}, environment)
    assert "the code in uae_jax/step.py" in mine
    for change in ({"config.rl.beta": 0.2}, {"the code in uae_jax/step.py": "0"}, {"the variable XLA_FLAGS": "--b"}):
        monkeypatch.setattr(hosts, "gathered", lambda value, change=change: [value, value, value | change])
        (name,) = change
        with pytest.raises(UserError, match=f"process 2 of 3 .*{name} is "):
            hosts.check_same(mine)
    monkeypatch.setattr(hosts, "gathered", lambda value: [value, value])
    hosts.check_same(mine)


def test_only_the_rows_that_are_asked_for_are_read():
    read = []

    class Counting(sources.ShapesSource):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    batches = sources.Batches(Counting(0, 20), range(20), 6, seed=3)
    whole = batches[5]
    read.clear()
    part = batches.part(5, np.array([1, 4]))
    assert read == whole["index"][[1, 4]].tolist()
    for name, x in part.items():
        np.testing.assert_array_equal(x, whole[name][[1, 4]])


def test_rows_land_where_the_whole_batch_would():
    mesh = jax.make_mesh((1, 1), sharding.AXES)
    batch = {"image": np.arange(12.0).reshape(4, 3)}
    rows = sharding.local_rows(4, mesh)
    assert rows.tolist() == [0, 1, 2, 3]
    placed = sharding.place_rows(batch, rows, 4, mesh)["image"]
    np.testing.assert_array_equal(placed, batch["image"])
    assert placed.sharding == sharding.place_batch(batch, mesh)["image"].sharding


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--num_processes=2", "--process_id=0"], "--coordinator_address is missing"),
        (["--coordinator_address=a:1", "--num_processes=2"], "--process_id is missing"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2: must be below"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=1"], "use host:port"),
    ],
)
def test_flags_that_make_no_place(flags, said):
    runtime.parse(main.FLAGS, ["main", "--config=configs/tiny.py", *flags])
    with pytest.raises(UserError, match=said):
        main.explicit_place()


@pytest.mark.parametrize(
    "environment,asked",
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {"cluster_detection_method": "slurm"}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}),
    ],
)
def test_the_environment_says_who_joins(monkeypatch, environment, asked):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    runtime.join(None, 77)
    assert calls == ([] if asked is None else [asked | {"heartbeat_timeout_seconds": 77}])
    calls.clear()
    runtime.join(runtime.Place("host:1", 2, 1), 77)
    assert calls[0]["coordinator_address"] == "host:1" and calls[0]["process_id"] == 1
