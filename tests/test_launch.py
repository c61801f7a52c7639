"""The launch scripts as a person uses them, with the tools that they call replaced by recorders."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uae_jax import runtime
from uae_jax.errors import UserError

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in LAUNCH.glob("*.sh"))
RUNNABLE = [Path(script).name for script in SCRIPTS if script != "launch/common.sh"]
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
    "logs": ["tpu_vm.sh", "logs", *POD],
    "stop": ["tpu_vm.sh", "stop", *POD],
    "delete": ["tpu_vm.sh", "delete", *POD],
    "gke run": ["gke_xpk.sh", "run", *JOB, "--type=v5p-64", "--slices=2", "--restarts=3", "--image=i", "--", *PROGRAM],
    "gke describe": ["gke_xpk.sh", "describe", *JOB],
    "gke delete": ["gke_xpk.sh", "delete", *JOB],
    "gke image": ["gke_xpk.sh", "image", "--image=host/a:latest"],
}

# Writes the words it was called with and the flags in its environment; makes the file that git is asked for.
RECORDER = r"""#!/bin/bash
for word in "$@"; do case $word in --output=/*) : >"${word#*=}" ;; esac; done
printf '%s\0' "${0##*/}" "$@" "$LIBTPU_INIT_ARGS" "$XLA_FLAGS" >>"$CALLS"
printf '\1' >>"$CALLS"
"""


class Machine:
    """A folder whose programs only write down how they were called."""

    def __init__(self, folder):
        self.home, self.calls = folder, folder / "calls"
        tools = folder / "tools"
        self.environment = dict(
            os.environ, PATH=f"{tools}:/usr/bin:/bin", CALLS=str(self.calls), TMPDIR=str(folder / "t m p")
        )
        for name in FLAGS:
            self.environment.pop(name, None)
        here = folder / "uae_jax" / ".venv" / "bin"  # what `tpu_vm.sh setup` makes on a host
        for place in (tools, here, folder / "t m p"):
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
        records = self.calls.read_text().split("\1")[:-1] if self.calls.exists() else []
        words = [record.split("\0")[:-1] for record in records]
        return done, [{"argv": call[:-2], "flags": dict(zip(FLAGS, call[-2:], strict=True))} for call in words]


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
        done, calls = machine("sh", "-euc", f"{remote(calls[0])}\nwait")
        assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call["argv"][call["argv"].index("-m") :] == ["-m", "uae_jax.main", *PROGRAM]
    platform = "gpu" if variable else "tpu"
    flags = subprocess.run(
        launch("xla_flags.sh", chosen or platform), capture_output=True, text=True, check=True
    ).stdout
    assert call["flags"] == {
        FLAGS[variable]: f"{flags.strip()} {mine[FLAGS[variable]]}".strip(),
        FLAGS[1 - variable]: "",
    }
    assert bool(flags.strip()) == (not chosen)


def test_many_nodes_and_slices(machine):
    def words(case):
        return machine(*launch(*CASES[case]))[1][0]["argv"]

    assert {"--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8"} <= set(words("slurm"))
    assert {"--node-id=pod", "--spot", "--runtime-version=v2-alpha-tpuv5"} <= set(words("create"))
    assert {"--node-count=4", "--node-prefix=pod", "--runtime-version=v2-alpha-tpuv6e"} <= set(words("create slices"))
    assert {"--node=all", "--worker=all"} <= set(words("run"))
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
    done = subprocess.run([shellcheck, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_flag_has_its_reason():
    lines = (LAUNCH / "xla_flags.sh").read_text().splitlines()
    flags = [at for at, line in enumerate(lines) if line.startswith("  --xla")]
    assert flags
    for at in flags:
        # Flags of one idea may stand below one reason.
        above = next(line for line in reversed(lines[:at]) if not line.startswith("  --xla"))
        assert above.startswith("  # "), lines[at]


def test_gpu_flags_are_known_to_this_jaxlib():
    """XLA ends a process that is given a flag it does not know."""
    flags = subprocess.run(launch("xla_flags.sh", "gpu"), capture_output=True, text=True, check=True).stdout.strip()
    code = "import jaxlib.xla_client as xla; xla.make_cpu_client()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, XLA_FLAGS=flags), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chosen,topology", [("tpu_v5e", "v5e:4x4"), ("tpu", "v5p:2x2x4"), ("tpu", "v6e:4x4")])
def test_tpu_flags_compile(chosen, topology):
    """libtpu ends a process that is given a flag it does not know, and refuses some on some chips when it compiles."""
    flags = subprocess.run(launch("xla_flags.sh", chosen), capture_output=True, text=True, check=True).stdout.strip()
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


@pytest.mark.parametrize("variable,value", [("SLURM_STEP_NUM_TASKS", "8"), ("TPU_WORKER_HOSTNAMES", "a,b")])
def test_the_program_refuses_to_be_one_of_several(monkeypatch, variable, value):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    runtime.refuse_many_processes()
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=r"one of [28] processes"):
        runtime.refuse_many_processes()
