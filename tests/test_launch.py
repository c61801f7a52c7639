"""The launch scripts as a person uses them, with the tools they call replaced by recorders; and the notebook."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.test_main import arguments

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUNNABLE = [script.name for script in SCRIPTS if script.name != "common.sh"]
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")

# Everything that a shell could take for its own.
PROGRAM = [
    "--config=configs/tiny.py",
    "--workdir=/a b/c",
    '--config.prompt.caption=it\'s "$HOME" `id` \\ * $(id) ;&|<> é!',
]
POD = ["--name=pod", "--zone=us-east5-a"]
GKE = ["--cluster=c", "--zone=z", "--project=p"]
JOB = [*GKE, "--name=job"]
CASES = {
    "gpu": ["gpu.sh", "--", *PROGRAM],
    "slurm": ["slurm_gpu.sh", "--nodes=4", "--partition=a b", "--account=me", "--", *PROGRAM],
    "create": ["tpu_vm.sh", "create", *POD, "--type=v5p-64", "--spot"],
    "create slices": ["tpu_vm.sh", "create", *POD, "--type=v6e-256", "--slices=4", "--project=a b"],
    "describe": ["tpu_vm.sh", "describe", *POD],
    "setup": ["tpu_vm.sh", "setup", *POD],
    "run": ["tpu_vm.sh", "run", *POD, "--", *PROGRAM],
    "delete": ["tpu_vm.sh", "delete", *POD],
    "gke run": ["gke_xpk.sh", "run", *JOB, "--type=v5p-64", "--slices=2", "--restarts=3", "--image=i", "--", *PROGRAM],
    "gke describe": ["gke_xpk.sh", "describe", *JOB],
    "gke delete": ["gke_xpk.sh", "delete", *JOB],
    "gke image": ["gke_xpk.sh", "image", "--image=host/a:latest"],
}

RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
call = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "flags": {{n: os.environ.get(n) for n in {FLAGS}}}}}
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(call), file=file)
"""


class Machine:
    """A folder whose programs only write down how they were called."""

    def __init__(self, folder):
        self.home, self.calls = folder, folder / "calls"
        tools = folder / "tools"
        self.environment = dict(os.environ, PATH=f"{tools}:/usr/bin:/bin", CALLS=str(self.calls), TMPDIR="/tmp/a b")
        for name in FLAGS:
            self.environment.pop(name, None)
        here = folder / "uae_jax" / ".venv" / "bin"  # what `tpu_vm.sh setup` makes on a host
        for place in (tools, here):
            place.mkdir(parents=True)
        for path in (
            *(tools / name for name in ("gcloud", "git", "docker", "xpk", "sbatch", "srun", "python")),
            here / "python",
        ):
            path.write_text(RECORDER)
            path.chmod(0o755)

    def __call__(self, *command, **environment):
        """Runs a command; returns how it ended, and the calls of recorders."""
        self.calls.unlink(missing_ok=True)
        done = subprocess.run(
            command, cwd=self.home, env=self.environment | environment, capture_output=True, text=True, timeout=60
        )
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return done, [json.loads(call) for call in calls]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def launch(name, *arguments):
    return ["bash", str(LAUNCH / name), *arguments]


def dry(case):
    """The case's command with --dry_run, before what is meant for the program."""
    name, *rest = CASES[case]
    at = rest.index("--") if "--" in rest else len(rest)
    return launch(name, *rest[:at], "--dry_run", *rest[at:])


@pytest.mark.parametrize("case", CASES)
def test_dry_run_prints_what_would_run(machine, case):
    done, calls = machine(*dry(case))
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr and not calls
    for line in done.stdout.splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True)
    printed, of_print = machine("sh", "-euc", done.stdout)
    real, of_run = machine(*launch(*CASES[case]))
    assert printed.returncode == real.returncode == 0, real.stderr
    assert of_run and of_print == of_run


def remote(call):
    """The command line that a tool is asked to start on other machines."""
    return next(word.partition("=")[2] for word in call["argv"] if word.startswith(("--command=", "--wrap=")))


@pytest.mark.parametrize("case,variable", [("gpu", 1), ("slurm", 1), ("run", 0), ("gke run", 0)])
@pytest.mark.parametrize("chosen", ["", "none"])
def test_the_program_gets_its_arguments_and_flags(machine, case, variable, chosen):
    name, *rest = CASES[case]
    if chosen:
        rest.insert(rest.index("--"), f"--xla_flags={chosen}")
    mine = {FLAGS[variable]: "--xla_mine='a b'"}
    _, calls = machine(*launch(name, *rest), **mine)
    if case == "gke run":
        given = next(word for word in calls[0]["argv"] if word.startswith("--env="))
        machine.environment |= dict([given.removeprefix("--env=").split("=", 1)])
    if case != "gpu":
        done, calls = machine("sh", "-euc", remote(calls[0]))
        assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call["argv"][call["argv"].index("-m") :] == ["-m", "uae_jax.main", *PROGRAM]
    platform = "gpu" if variable else "tpu"
    flags = subprocess.run(
        launch("xla_flags.sh", chosen or platform), capture_output=True, text=True, check=True
    ).stdout
    assert call["flags"] == {
        FLAGS[variable]: f"{flags.strip()} {mine[FLAGS[variable]]}".strip(),
        FLAGS[1 - variable]: None,
    }
    assert bool(flags.strip()) == (not chosen)


def test_many_nodes_and_slices(machine):
    def words(case):
        return machine(*launch(*CASES[case]))[1][0]["argv"]

    assert {"--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8"} <= set(words("slurm"))
    assert {"--node-id=pod", "--spot", "--runtime-version=v2-alpha-tpuv5"} <= set(words("create"))
    assert {"--node-count=4", "--node-prefix=pod", "--runtime-version=v2-alpha-tpuv6e"} <= set(words("create slices"))
    assert {"--node=all", "--worker=all", "--batch-size=all"} <= set(words("run"))
    assert "--num-slices=2" in words("gke run")


@pytest.mark.parametrize(
    "command,named",
    [
        (["gpu.sh"], "--config"),
        (["gpu.sh", "--config=configs/tiny.py"], "--config=configs/tiny.py"),
        (["gpu.sh", "--", "--workdir=a"], "--config"),
        (["gpu.sh", "--xla_flags=cpu", "--", "--config=a"], "cpu"),
        (["gpu.sh", "--", "--config=a", "two\nlines"], "line break"),
        (["slurm_gpu.sh", "--nodes=none", "--", "--config=a"], "--nodes=none"),
        (["slurm_gpu.sh", "--gpus=0", "--", "--config=a"], "--gpus=0"),
        (["slurm_gpu.sh", "--time=", "--", "--config=a"], "--time"),
        (["tpu_vm.sh"], "create"),
        (["tpu_vm.sh", "start", *POD], "start"),
        (["tpu_vm.sh", "describe", "--name=pod"], "--zone"),
        (["tpu_vm.sh", "create", *POD], "--type"),
        (["tpu_vm.sh", "create", *POD, "--type=v9-8"], "--runtime"),
        (["tpu_vm.sh", "create", *POD, "--type=v5p-64", "--slices=1.5"], "--slices=1.5"),
        (["tpu_vm.sh", "run", *POD, "--zome=z", "--", "--config=a"], "--zome=z"),
        (["gke_xpk.sh", "image"], "--image"),
        (["gke_xpk.sh", "run", *GKE, "--", "--config=a"], "--name"),
        (["gke_xpk.sh", "run", *JOB, "--image=i", "--", "--config=a"], "--type"),
        (["gke_xpk.sh", "run", *JOB, "--restarts=-1"], "--restarts=-1"),
        (["xla_flags.sh"], "tpu"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(machine, command, named):
    done, calls = machine(*launch(*command))
    assert done.returncode == 2 and not calls and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr


def test_a_tool_that_is_not_there(machine):
    (machine.home / "tools" / "xpk").unlink()
    done, _ = machine(*launch(*CASES["gke delete"]))
    assert done.returncode == 2 and "xpk" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_manual(machine, name):
    done, calls = machine(*launch(name, "--help"))
    assert done.returncode == 0 and not calls and f"launch/{name}" in done.stdout
    assert name == "xla_flags.sh" or "--dry_run" in done.stdout
    assert os.access(LAUNCH / name, os.X_OK)


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.executable).parent)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_flag_has_its_reason():
    lines = (LAUNCH / "xla_flags.sh").read_text().splitlines()
    flags = [at for at, line in enumerate(lines) if line.startswith("  --")]
    assert flags
    for at in flags:
        # Flags of one idea may stand below one reason.
        above = next(line for line in reversed(lines[:at]) if not line.startswith("  --"))
        assert above.startswith("  # "), lines[at]


def test_gpu_flags_are_known_to_this_jaxlib():
    """XLA ends a process that is given a flag it does not know."""
    flags = subprocess.run(launch("xla_flags.sh", "gpu"), capture_output=True, text=True, check=True).stdout.strip()
    code = "import jaxlib.xla_client as xla; xla.make_cpu_client()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, XLA_FLAGS=flags), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_tpu_flags_compile(topology):
    """libtpu ends a process that is given a flag it does not know, and refuses some on some chips when it compiles."""
    flags = subprocess.run(launch("xla_flags.sh", "tpu"), capture_output=True, text=True, check=True).stdout.strip()
    code = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
devices = topologies.get_topology_desc(sys.argv[1], "tpu")
rows = NamedSharding(topologies.make_mesh(devices, (len(devices.devices),), ("fsdp",)), P("fsdp"))
x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=rows)
jax.jit(lambda w, x: jax.lax.with_sharding_constraint(jnp.tanh(x @ w) @ w, rows)).lower(x, x).compile()
"""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    done = subprocess.run(
        [sys.executable, "-c", code, topology],
        env=environment | {"LIBTPU_INIT_ARGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-500:]
