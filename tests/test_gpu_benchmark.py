"""The benchmark of GPUs, as far as a machine without one can try it."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import gpu
from configs import gpu_1b
from uae_jax import sharding
from uae_jax.errors import UserError
from uae_jax.planning import abstract


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="there may be a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(UserError, match="the benchmark is of GPUs"):
        gpu.main(["gpu"])


def test_sizes_are_those_it_names():
    config = gpu_1b.get_config()
    run = abstract.build(config, sharding.make_mesh(config, jax.devices()[:1]))
    millions = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) / 1e6 for name, part in run.frozen.items()}
    assert 2150 < millions["start"] < 2250, "1.54B and a vision tower of 0.67B"
    assert 2450 < millions["transformer"] < 2490


@pytest.mark.slow
def test_it_measures_what_there_is(tmp_path):
    arguments = ("--config=configs/tiny.py", "--any_device", f"--out={tmp_path / 'gpu.json'}")
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--config.rl.rollout_microbatches=2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    *parts, step = found["phases"]
    assert [row["phase"] for row in parts] == ["sample", "redraw", "score", "update"] and step["phase"] == "step"
    assert step["flops"] == pytest.approx(sum(row["flops"] for row in parts))
    assert all(0 < row["seconds"]["min"] <= row["seconds"]["median"] for row in found["phases"])
