"""A long run of the program: memory stays flat, no file handle leaks, nothing is compiled after the first steps.

python -m pytest -n 0 -s --run-slow tests/test_soak.py -k 2000
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from tests import tiny
from uae_jax import runtime, train
from uae_jax.metrics import Writer

ROOT = Path(__file__).parents[1]
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event a program, from the persistent cache or not
FLAT = 2000  # bytes a step: ten thousand steps then cost 20 MB
EVERY = 10  # steps between looks at the memory
SETTLED = 0.25  # share of the run after which memory is expected to stay


def own_memory() -> int:
    """Bytes that this process has asked for and written to, wherever they are: a system short of memory takes pages of
    programs and files away, and moves others out, which is no sign of a leak or of none."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))


def worker(weights: str, workdir: str, steps: int) -> None:
    """Trains with memory prepared as every command does, and writes what was seen to workdir/seen.json."""
    runtime.keep_memory()
    process = psutil.Process()
    seen: dict[str, list[int]] = {"memory": [], "handles": [], "compiled": [], "arrays": []}
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: events.append(event) if event == COMPILED else None
    )
    write = Writer.write

    def measured(self, step, metrics):
        write(self, step, metrics)
        if step % EVERY == 0:
            gc.collect()  # what is only not collected yet, or not given back by the allocator, is no leak
            ctypes.CDLL(None).malloc_trim(0)
            seen["memory"].append(own_memory())
        seen["handles"].append(process.num_fds())
        seen["compiled"].append(len(events))
        seen["arrays"].append(len(jax.live_arrays()))

    Writer.write = measured
    config = tiny.config(
        Path(weights), steps=steps, eval__enabled=True, eval__every=50, eval__batch_size=4, eval__pictures=2,
        checkpoint__every=100,
    )  # fmt: skip
    train.run(config, Path(workdir))
    (Path(workdir) / "seen.json").write_text(json.dumps(seen))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, 2000])
def test_a_long_run_keeps_nothing(weights, tmp_path, steps):
    code = f"from tests.test_soak import worker; worker({str(weights)!r}, {str(tmp_path / 'run')!r}, {steps})"
    environment = dict(os.environ, JAX_DISABLE_MOST_OPTIMIZATIONS="0")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "run" / "seen.json").read_text())
    memory, handles, compiled, arrays = (seen[name] for name in ("memory", "handles", "compiled", "arrays"))
    assert len(handles) == steps

    start = int(SETTLED * steps)
    settled = np.asarray(memory[start // EVERY :], float)
    slope = np.polyfit(EVERY * np.arange(len(settled)), settled, 1)[0]
    mib = [memory[at] / 2**20 for at in (0, start // EVERY, -1)]
    print(f"{steps} steps: {mib[0]:.0f} MiB after {EVERY}, {mib[1]:.0f} after {start}, {mib[2]:.0f} at the end")
    print(f"slope {slope:.0f} bytes a step; handles {handles[start]}, {handles[-1]} at the end, {max(handles)} at most")
    print(f"programs: {compiled[0]} after the first step, {compiled[-1]} at the end")
    # The first evaluation and the first save have seen everything that there is to compile.
    assert compiled[-1] == compiled[start], "something was compiled again"
    assert compiled[8] == compiled[0], "the step itself was compiled again"
    # A save under way has files open and arrays in hand: a leak raises what is left between saves.
    early, late = slice(0, start + 1), slice(-(steps // 4), None)
    assert min(handles[late]) <= min(handles[early]) and max(handles) < min(handles) + 64
    assert min(arrays[late]) <= min(arrays[early])
    if steps >= 1000:  # a slope over less is noise
        assert slope < FLAT
