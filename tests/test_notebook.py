"""The notebook in launch/, run as a script: its cells are plain Python, so that it works outside Colab too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.test_main import arguments

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def cells():
    """The notebook's code cells: (tags, source)."""
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    return [
        (cell["metadata"].get("tags", []), "".join(cell["source"]))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def run_notebook(parameters, folder, **environment):
    """The notebook in a fresh process that starts in launch/, with other values for its parameters."""
    sources = []
    for tags, source in cells():
        sources.append(source)
        if "parameters" in tags:
            known = dict.fromkeys(line.split(" = ")[0] for line in source.splitlines())
            assert parameters.keys() <= known.keys()
            sources += [f"{name} = {value!r}" for name, value in parameters.items()]
    script = folder / "notebook.py"
    script.write_text("\n".join([*sources, f"sheet.save({str(folder / 'sheet.png')!r})"]))
    environment = dict(os.environ, PYTHONPATH=str(ROOT)) | environment
    return subprocess.run([sys.executable, script], cwd=LAUNCH, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_notebook_on_cpu(weights, tmp_path):
    """A small dose of the whole: two updates of a tiny random system."""
    workdir, given = tmp_path / "run", "--xla_cpu_enable_fast_math=false"
    config = tiny.config(
        weights, steps=2, eval__enabled=True, eval__every=1, eval__batch_size=4, eval__pictures=2, redraw__steps=1
    )
    overrides = [flag for flag in arguments(config, workdir) if flag.startswith("--config.") and ".steps=2" not in flag]
    parameters = {"STEPS": 2, "WORKDIR": str(workdir), "OVERRIDES": overrides}
    done = run_notebook(parameters, tmp_path, XLA_FLAGS=given)
    assert done.returncode == 0, done.stderr
    assert "training on cpu" in done.stdout and "reward_ceiling" in done.stdout
    assert (workdir / "metrics.jsonl").read_text().count("\n") == 2 and (tmp_path / "sheet.png").stat().st_size
    # The run tells which compiler flags it was given.
    assert done.stdout.count(f"XLA_FLAGS: {given}\n") == 1
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["flags"] == {"XLA_FLAGS": given} and environment["devices"]["count"] == 1


@pytest.mark.slow
def test_whole_notebook_learns(tmp_path):
    done = run_notebook({"WORKDIR": str(tmp_path / "run")}, tmp_path, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert results["after"]["reward"] > results["before"]["reward"] + 0.5


@pytest.mark.parametrize(
    "devices,chosen", [("cpu,gpu,tpu", "tpu,cpu"), ("gpu,cpu", "cuda,cpu"), ("cpu", "cpu")]
)  # fmt: skip
def test_notebook_takes_a_tpu_then_a_gpu_then_the_cpu(tmp_path, monkeypatch, devices, chosen):
    (tmp_path / "jax.py").write_text(
        "import os\n"
        "def devices(platform):\n"
        f"    if os.environ.get('JAX_PLATFORMS') or platform not in {devices.split(',')}:\n"
        "        raise RuntimeError(platform)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = next(source for _, source in cells() if "PROBE" in source)
    names = {"os": os, "sys": sys, "subprocess": subprocess}
    exec(source, names)
    assert names["JAX_PLATFORMS"] == chosen
