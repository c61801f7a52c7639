"""Several processes that train as one, for real: on CPU, with virtual devices and gloo between them."""

import json
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from tests import devices, tiny
from tests.test_main import ROOT, arguments, lines, wait_for_line
from uae_jax import checkpoint, heartbeat, hosts, main, runtime, sharding
from uae_jax.data import sources
from uae_jax.errors import UserError

DEVICES, STEPS = 4, 12
ROUNDING = ("logp/sampler_gap", "ratio/max_abs_dev_first")  # metrics that measure nothing else: they have a bound
HEARTBEAT = 15  # seconds; a busy machine lets a living process miss a shorter one


def start(flags, cache, count, **environment):
    """The program on `count` virtual devices."""
    environment = devices.environment(
        count, JAX_DEFAULT_MATMUL_PRECISION="highest", JAX_COMPILATION_CACHE_DIR=str(cache), **environment
    )
    return subprocess.Popen(
        [sys.executable, "-m", "uae_jax.main", *flags],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_many(count, flags, cache, own=(), slurm=False):
    """`count` processes that share DEVICES devices; `own[i]` are further flags of process i."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for i in range(count):
        place = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
        environment = {}
        if slurm:  # as srun sets them; the port follows from the job
            environment = {
                "SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count),
                "SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i),
            }  # fmt: skip
            place = []
        processes.append(start([*flags, *place, *(own[i] if own else ())], cache, DEVICES // count, **environment))
    return processes


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


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "evaluated"])
def config(weights, request):
    """Weights split over two devices, batches over four; with evaluation or without."""
    return tiny.config(
        weights, steps=STEPS, data__batch_size=4, data__held_out=8, eval__enabled=request.param, eval__every=6,
        eval__batch_size=4, eval__pictures=2, mesh__data=2, mesh__fsdp=2, checkpoint__every=3,
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
            if name.startswith(ROUNDING):
                assert row[name] < 1e-4 and value < 1e-4, name
            else:
                np.testing.assert_allclose(row[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert (workdir / "eval.json").exists() == (expected / "eval.json").exists()
    for when in ("before", "after") if (workdir / "eval.json").exists() else ():
        found, evaluation = (json.loads((path / "eval.json").read_text()) for path in (workdir, expected))
        assert found[when]["captions"] == evaluation[when]["captions"]
        np.testing.assert_allclose(found[when]["reward"], evaluation[when]["reward"], atol=1e-5)
    step = checkpoint.newest_whole(workdir / "checkpoints")
    assert step == checkpoint.newest_whole(expected / "checkpoints") == len(rows)
    leaves, others = (checkpoint.open_leaves(path / "checkpoints", step, "") for path in (workdir, expected))
    assert leaves.shapes == others.shapes and len(leaves.shapes) > 20
    for name in leaves.shapes:
        np.testing.assert_allclose(leaves.read(name), others.read(name), rtol=1e-4, atol=1e-5, err_msg=name)


def wait_for_checkpoint(process, workdir, step):
    """Until there is one of `step` or later."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (checkpoint.newest_whole(workdir / "checkpoints") or 0) >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"no checkpoint of step {step} before the end: {process.communicate()}")


def stopped_together(processes, workdir, after):
    """The step at which all stopped, the last one having been asked to when the first had written `after` lines."""
    wait_for_line(processes[0], workdir, after)
    processes[-1].send_signal(signal.SIGTERM)
    done = ended(processes)
    assert [code for code, _, _ in done] == [0] * len(processes), done
    step = checkpoint.newest_whole(workdir / "checkpoints")
    assert step == len(lines(workdir))
    assert f"stopped at step {step} of {STEPS}; the same command continues" in done[0][1]
    return step


@pytest.mark.parametrize(
    ("count", "asked"), [(2, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_stopped_killed_and_resumed_on_fewer(alone, config, cache, tmp_path, count, asked):
    """Several processes, asked to stop at one; again, and one dies; half as many go on: all of it is the run of one."""
    workdir = tmp_path / "run"
    flags = [*arguments(config, workdir), f"--config.heartbeat_seconds={HEARTBEAT}"]
    first = stopped_together(start_many(count, flags, cache), workdir, 1) if asked else 0
    assert first < STEPS

    processes = start_many(count, flags, cache)
    wait_for_checkpoint(processes[0], workdir, first + 1)
    processes[-1].kill()
    began = time.monotonic()
    *others, _ = ended(processes, seconds=120)
    assert time.monotonic() - began < 1.5 * HEARTBEAT + 5
    for code, _, errors in others:
        last = errors.strip().splitlines()[-1]
        assert code == 2 and last.startswith(f"error: process {count - 1} of {count} is gone: silent for"), errors
        assert "continues from the last checkpoint" in last and "Traceback" not in errors and "@ " not in errors
    second = checkpoint.newest_whole(workdir / "checkpoints")
    assert first < second < STEPS

    fewer = count // 2
    done = ended(start_many(fewer, flags, cache) if fewer > 1 else [start(flags, cache, DEVICES)])
    assert [code for code, _, _ in done] == [0] * fewer, done
    assert f"resuming {workdir} at step {second}" in done[0][1]
    assert not any("resuming" in output or "step" in output for _, output, _ in done[1:])  # the first alone tells
    assert_same_run(workdir, alone)


@pytest.mark.slow
def test_the_death_of_the_first_process_ends_the_others(config, cache, tmp_path):
    flags = [*arguments(config, tmp_path / "run"), "--config.eval.enabled=False", "--config.steps=100000"]
    processes = start_many(2, flags, cache)
    wait_for_line(processes[0], tmp_path / "run", 1)
    processes[0].kill()
    _, (code, _, errors) = ended(processes, seconds=60)
    assert code == 2 and errors.strip().splitlines()[-1].startswith("error: process 0 of 2 is gone"), errors


@pytest.mark.slow
def test_a_fault_of_one_process_ends_the_others(config, cache, tmp_path):
    """A fault that one process alone meets: the rest hear of it."""
    flags = [*arguments(config, tmp_path / "run"), "--config.eval.enabled=False"]
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)  # met by the first alone
    (first, _, told), (second, _, heard) = ended(start_many(2, flags, cache))
    assert first == 2 and told.strip().splitlines()[-1].startswith("error: cannot write"), told
    assert second == 2 and "error: process 0 of 2 is gone: cannot write" in heard, heard


def test_processes_that_would_differ_are_refused(config, cache, tmp_path):
    own = ([], ["--config.rl.beta=0.5"])
    for code, _, errors in ended(start_many(2, arguments(config, tmp_path / "run"), cache, own, slurm=True)):
        assert code == 2, errors
        line = errors.strip().splitlines()[-1]
        assert line.startswith("error: process 1 of 2 ") and "config.rl.beta is 0.5 there, 0.02 in process 0" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
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

    batches = sources.batches(Counting(0, 20), range(20), 6, seed=3)
    whole = batches[5]
    read.clear()
    part, _ = batches.read(5, np.array([1, 4]))
    assert read == whole["index"][[1, 4]].tolist()
    for name, x in part.items():
        np.testing.assert_array_equal(x, whole[name][[1, 4]])


def test_rows_land_where_the_whole_batch_would():
    mesh = jax.make_mesh((1, 1, 1, 1), sharding.AXES)
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
    "environment,tpu,asked",
    [
        ({}, False, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, False, {"cluster_detection_method": "slurm"}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "1"}, True, None),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476", "TPU_WORKER_HOSTNAMES": "a"}, True, {}),
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not determine TPU worker hostnames, please set them"}, True, None),
        ({}, True, {}),  # a TPU VM: its metadata tell
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_the_environment_says_who_joins(environment, tpu, asked):
    assert runtime.others(environment, tpu) == asked


def test_flags_go_before_the_environment(monkeypatch):
    calls = []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(
        heartbeat, "Watch", lambda seconds: types.SimpleNamespace(close=lambda: calls.append(seconds), lost=None)
    )
    with runtime.joined(None, 77):
        pass
    with runtime.joined(runtime.Place("host:1", 2, 1), 77):
        pass
    (slurm, closed, flags, _), longer = calls, {"heartbeat_timeout_seconds": 77 * heartbeat.JAX_FACTOR}
    assert closed == 77 and slurm == {"cluster_detection_method": "slurm"} | longer
    place = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert flags == place | {"cluster_detection_method": "deactivate"} | longer


def test_silence_is_an_unchanged_beat():
    silence = heartbeat.Silence(3, now=100.0)
    assert silence.longer({0: "a", 1: "a"}, 109.0, 10) == []
    assert silence.longer({0: "b", 1: "a"}, 112.0, 10) == [2]  # never heard
    assert silence.longer({0: "b", 1: "a", 2: "a"}, 119.5, 10) == [1]
    assert silence.longer({0: "b", 1: "b", 2: "a"}, 120.0, 10) == []
