"""The program as a person runs it: end to end, killed and resumed, and given bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests import devices, tiny
from uae_jax import reconstruct, report, train
from uae_jax.errors import UserError

ROOT = Path(__file__).parents[1]
TIMINGS = ("throughput/images_per_s", "throughput/tokens_per_s")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compilation cache for this process and those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", before)


def lines(workdir):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def arguments(config, workdir):
    """The command line that turns configs/tiny.py into `config`."""
    base, flags = tiny.default_fields(), []
    for name, value in tiny.flat(config).items():
        if base[name] != value:
            flags.append(f"--config.{name}={value}")
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *flags]


def command(*args, cache=None):
    """A finished run of the program."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_DEFAULT_MATMUL_PRECISION="highest")
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    return subprocess.Popen(
        [sys.executable, "-m", "uae_jax.main", *args],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(weights, cache, tmp_path_factory):
    """A whole run of six steps with everything switched on; its workdir and config."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny.config(
        weights, steps=6, eval__enabled=True, eval__every=3, eval__batch_size=4, eval__pictures=2, checkpoint__every=2
    )
    train.run(config, workdir)
    return workdir, config


def test_end_to_end(finished):
    workdir, config = finished
    rows = lines(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    promised = {
        "loss", "reward/mean", "reward/std", "reward/group_std", "caption/length", "caption/truncated", "kl",
        "ratio/max_abs_dev_first", "ratio/clip_fraction", "advantage/zero_groups", "logp/sampler_gap",
        "update_norm/encoder", "update_norm/decoder", "grad_norm", "bad_steps",
    }  # fmt: skip
    assert promised <= rows[0].keys()
    assert all(row["update_norm/encoder"] > 0 for row in rows)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    results = json.loads((workdir / "eval.json").read_text())
    fields = {
        "reward", "reward_second_tower", "reward_ceiling", "caption_length", "caption_recall", "caption_precision",
        "caption_malformed", "perception", "redraw_accuracy", "by_category", "controls",
    }  # fmt: skip
    assert fields <= results["before"].keys() and fields <= results["after"].keys()
    assert {p.name for p in (workdir / "samples").iterdir()} == {
        f"held_out_{s:06d}.{kind}" for s in (0, 3, 6) for kind in ("png", "npz")
    }
    assert json.loads((workdir / "config.json").read_text())["steps"] == config.steps
    assert list((workdir / "tensorboard").iterdir()) and list((workdir / "checkpoints").iterdir())


def test_the_change_is_paired_and_has_an_interval(finished):
    results = json.loads((finished[0] / "eval.json").read_text())
    before, after, change = results["before"], results["after"], results["change"]
    assert np.isclose(change["reward"]["mean"], after["reward"] - before["reward"])
    assert change["reward"]["low"] <= change["reward"]["mean"] <= change["reward"]["high"]
    # The decoder is frozen and reads frozen states: true captions earn what they earned.
    assert change["reward_ceiling"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_the_report_of_a_run(finished, tmp_path):
    workdir, _ = finished
    report.write([workdir, workdir], tmp_path)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[2].startswith("| reward |") and all(row.count("|") == table[0].count("|") for row in table)
    curves, redraws = (np.asarray(Image.open(tmp_path / name)) for name in ("curves.png", "redraws.png"))
    assert curves.std() > 0
    # Source, step 0, 3, 6 beside each other; two scenes under each other.
    assert redraws.shape[1] > 4 * 120 and redraws.shape[0] > 2 * 120
    assert not (workdir / "report").exists()


def test_a_report_needs_a_finished_run(tmp_path):
    with pytest.raises(UserError, match="finished run"):
        report.write([tmp_path], tmp_path)


@pytest.mark.slow
def test_the_live_text_encoder_has_a_canary(weights, tmp_path):
    train.run(
        tiny.config(
            weights, steps=2, text_encoder="live", eval__enabled=True, eval__every=1, eval__batch_size=4,
            data__held_out=4, eval__pictures=2, optimizer__learning_rate=0.03, optimizer__warmup=0,
        ),
        tmp_path,
    )  # fmt: skip
    canary = [row["canary/reference_reward"] for row in lines(tmp_path)]
    results = json.loads((tmp_path / "eval.json").read_text())
    # All held-out scenes fit into one batch here: the canary is the ceiling under the weights of its step.
    assert np.isclose(canary[-1], results["after"]["reward_ceiling"], atol=1e-6)
    assert not np.isclose(canary[-1], results["before"]["reward_ceiling"], atol=1e-4)


def test_a_finished_run_is_not_run_again(finished):
    workdir, config = finished
    before = (workdir / "metrics.jsonl").read_text()
    train.run(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def wait_for_line(process, workdir, count):
    """Until metrics.jsonl has `count` lines."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    output, errors = process.communicate()
    pytest.fail(f"no line {count} before the end: {output}{errors}")


@pytest.mark.slow  # tests/test_faults.py does so to a smaller program in the same loop
def test_killed_and_resumed_equals_uninterrupted(finished, cache, tmp_path):
    whole, config = finished
    workdir = tmp_path / "interrupted"
    flags = arguments(config, workdir)

    process = command(*flags, cache=cache)
    wait_for_line(process, workdir, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = command(*flags, cache=cache)  # goes on, and is asked to stop
    wait_for_line(process, workdir, 4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors

    process = command(*flags, cache=cache)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert lines(workdir) == lines(whole)
    after = [json.loads((path / "eval.json").read_text())["after"] for path in (workdir, whole)]
    assert after[0] == after[1]


def test_another_config_in_the_same_workdir(finished, cache):
    workdir, config = finished
    process = command(*arguments(config, workdir), "--config.rl.beta=0.5", cache=cache)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("error: ") and "rl.beta" in errors and "--workdir" in errors and errors.count("\n") == 1
    assert len(lines(workdir)) == 6


@pytest.mark.parametrize(
    "flags,named,remedy",
    [
        (["--config.rl.group_sise=4"], "config.rl.group_sise", "config.rl.group_size"),
        (["--config.group_size=4"], "config.group_size", "config.rl.group_size"),
        (["--config.steps=many"], "config.steps", "int"),
        (["--config.rl.group_size=1"], "config.rl.group_size", "2 or more"),
        (["--config.reward.clop=1.0"], "config.reward.clop", "config.reward"),
        (["--config.data.source=folder"], "config.data.path", "folder"),
        (["--config=configs/none.py"], "configs/none.py", "no file"),
        (["--config.data.source=folder", "--config.data.path=EMPTY"], "EMPTY", "image"),
        (["--config.weights=EMPTY"], "captioner", "config.json"),
        (["--workdir=FILE/run"], "FILE", "not a directory"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(weights, cache, tmp_path, flags, named, remedy):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    places = {"EMPTY": str(tmp_path / "empty"), "FILE": str(tmp_path / "file")}
    for name, path in places.items():
        flags = [flag.replace(name, path) for flag in flags]
    base = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", f"--config.weights={weights}"]
    process = command(*base, *flags, cache=cache)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert places.get(named, named) in errors and remedy.lower() in errors.lower()


def test_batch_that_the_mesh_cannot_divide(weights):
    environment = devices.environment(3)
    flags = ["--config=configs/tiny.py", f"--config.weights={weights}", "--workdir=/nonexistent/run"]
    done = subprocess.run(
        [sys.executable, "-m", "uae_jax.main", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "data.batch_size" in done.stderr and "multiple of 3" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_full_disk_is_one_line_and_loses_nothing(finished, cache, tmp_path):
    """A real limit on file sizes stops the first checkpoint; what was written before stays readable."""
    _, config = finished
    workdir = tmp_path / "full"
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000));"
        "from uae_jax import main, runtime; runtime.run(main.main, ['main', *sys.argv[1:]])"
    )
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_ENABLE_COMPILATION_CACHE="false")
    flags = [*arguments(config, workdir), "--config.eval.enabled=False", "--config.checkpoint.every=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(workdir) in last and "Traceback" not in done.stderr
    assert lines(workdir)[0]["step"] == 1


def test_own_photographs(weights, cache, tmp_path):
    """A folder with good and broken files trains; the broken ones are named."""
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "coffee.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    config = tiny.config(
        weights, steps=2, data__source="folder", data__path=str(tmp_path), eval__enabled=True, eval__batch_size=2,
        eval__pictures=2, data__held_out=2, data__max_bad_fraction=0.5,
    )  # fmt: skip
    train.run(config, tmp_path / "run")
    assert len(lines(tmp_path / "run")) == 2
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["after"].keys() >= {"reward", "reward_second_tower", "caption_length", "controls"}
    assert "caption_recall" not in results["after"]


def test_reconstruct(finished, tmp_path, capsys):
    workdir, _ = finished
    picture, out = tmp_path / "picture.png", tmp_path / "out.png"
    Image.fromarray(tiny.scenes(1)[0]).resize((100, 80)).save(picture)
    (tmp_path / "broken.png").write_text("no picture")
    reconstruct.reconstruct(workdir, [str(picture), str(tmp_path / "broken.png")], out)
    printed = capsys.readouterr()
    assert "weights of step 6" in printed.out and "clip" in printed.out and str(picture) in printed.out
    assert "broken.png" in printed.err
    assert Image.open(out).width > 2 * 192
    with pytest.raises(UserError, match="usable"):
        reconstruct.reconstruct(workdir, [str(tmp_path / "broken.png")], out)
    with pytest.raises(UserError, match="workdir"):
        reconstruct.reconstruct(tmp_path, [str(picture)], out)
