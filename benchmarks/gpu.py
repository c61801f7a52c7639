"""What only a GPU can show of the step: seconds, FLOP/s and memory at the size of a 1.5B captioner and SD3.5-medium.

    python -m benchmarks.gpu [--out=FILE.json] [--config=FILE] [--config.FIELD=VALUE]

Weights are random, and so are the images: nothing is downloaded, and hardly a caption ends early. Prints, and writes as
JSON: each phase compiled apart and the one program of them all (median and spread of repeated runs after a warm-up),
the FLOPs that `uae_jax.plan` counts for them and the share of the GPU's published peak that they reach, the time that
the roofline allows, what the compiler allots, the most memory in use, and attention by cuDNN against XLA. Where there
is no GPU it says so and stops; `--any_device` tries the benchmark itself.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from benchmarks.phases import measure, timed
from uae_jax import config as configs
from uae_jax import runtime, storage
from uae_jax.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", "", "JSON file to write", flag_values=FLAGS)
flags.DEFINE_boolean("any_device", False, "run where there is no GPU, too", flag_values=FLAGS)
config_flags.DEFINE_config_file(
    "config", "configs/gpu_1b.py", "what runs; fields are changed by --config.FIELD=VALUE", lock_config=True,
    flag_values=FLAGS,
)  # fmt: skip

CHIPS = {"H200": "h200", "H100": "h100"}  # part of a device's name, and its key in `topology.CHIPS`
ATTENTION = (2, 8, 4429, 24, 64)  # guidance, images, tokens, heads, channels: SD3.5-medium at 1,024 pixels
WARM = 0.02  # deviation of random weights


def filled(tree: Any, scale: float) -> Any:
    """Arrays of a tree's shapes, types and places: normal numbers of this deviation, zeros of whole numbers."""
    import jax
    import jax.numpy as jnp

    def of(number: int, x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(number)
        if not scale or not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        draw = jax.jit(lambda key: scale * jax.random.normal(key, x.shape, x.dtype), out_shardings=x.sharding)
        return draw(jax.random.key(number))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [of(number, x) for number, x in enumerate(leaves)])


def rows(run: Any, chip: Any) -> list[dict[str, Any]]:
    """Times of the phases and of the step, beside what they could be on one such chip."""
    import jax

    from uae_jax.planning import flops, phases, roofline

    state = filled(run.state, WARM).replace(opt_state=filled(run.state.opt_state, 0.0))
    side = run.config.data.image_size
    images = jax.random.randint(jax.random.key(1), (run.config.data.batch_size, side, side, 3), 0, 256, "uint8")
    found, total = [], flops.Work()
    for name, (phase, compiled, seconds) in measure(run, state, filled(run.frozen, WARM), images).items():
        work = total if name == phases.WHOLE else phase.work()
        total = total.plus(work)
        allotted = compiled.memory_analysis()
        median = statistics.median(seconds)
        bound = roofline.estimate(roofline.Load(work.flops(1), work.bytes(1), 0.0, 0.0), chip)
        found.append(
            {
                "phase": name,
                "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
                "flops": work.flops(1),
                "flops_per_second": work.flops(1) / median,
                "share_of_peak": work.flops(1) / median / chip.flops,
                "roofline_seconds": bound.seconds,
                "bound": bound.bound,
                "allotted_bytes": allotted.argument_size_in_bytes + allotted.temp_size_in_bytes,
            }
        )
    return found


def attentions() -> dict[str, float]:
    """Median seconds of attention forward and backward, by cuDNN and by XLA; XLA's alone where there is no GPU."""
    import jax
    import jax.numpy as jnp

    from uae_jax.models import attention

    gpu = jax.devices()[0].platform == "gpu"
    shape = ATTENTION if gpu else (1, 1, 64, 2, 16)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    seen = jnp.ones((*shape[:2], shape[2]), bool)
    scale = shape[-1] ** -0.5
    kernels = {"xla": lambda q, k, v: attention.xla(q, k, v, seen[..., None, :], None, scale)}
    if gpu:
        kernels["cudnn"] = lambda q, k, v: attention.cudnn(q, k, v, seen, scale=scale)
    found = {}
    for name, kernel in kernels.items():
        gradient = jax.grad(lambda *x, kernel=kernel: kernel(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        for part, function in (("forward", kernel), ("forward and backward", gradient)):
            found[f"{name}, {part}"] = statistics.median(timed(jax.jit(function), q, k, v)[1])
    return found


def main(arguments: list[str]) -> None:
    """Runs all of it on the first GPU."""
    config = runtime.parse(FLAGS, arguments)
    configs.validate(config)
    runtime.prepare()
    import jax
    from rich.console import Console
    from rich.table import Table

    from uae_jax import sharding
    from uae_jax.planning import abstract, topology

    device = jax.devices()[0]
    if device.platform != "gpu" and not FLAGS.any_device:
        raise UserError(
            f"this machine computes on {device.device_kind}: the benchmark is of GPUs; --any_device runs it regardless"
        )
    kind = next((key for part, key in CHIPS.items() if part in device.device_kind), None)
    if kind is None and device.platform == "gpu":
        raise UserError(f"no published figures of {device.device_kind}: add them to uae_jax/planning/topology.py")
    run = abstract.build(config, sharding.make_mesh(config, [device]))
    result = {"device": device.device_kind, "jax": jax.__version__, "config": config.to_dict()}
    result["phases"] = rows(run, topology.CHIPS[kind or "cpu"])
    result["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    apart = sum(row["seconds"]["median"] for row in result["phases"][:-1])
    result["phases_to_step"] = apart / result["phases"][-1]["seconds"]["median"]
    result["attention"] = attentions()

    title = f"{device.device_kind}, {config.data.batch_size} images of {config.rl.group_size} captions"
    table = Table("phase", "ms (min to max)", "TFLOP/s", "of peak", "roofline", "GiB", title=title)
    for row in result["phases"]:
        median, least, most = (1e3 * row["seconds"][name] for name in ("median", "min", "max"))
        table.add_row(
            row["phase"],
            f"{median:.1f} ({least:.1f} to {most:.1f})",
            f"{row['flops_per_second'] / 1e12:.1f}",
            f"{row['share_of_peak']:.1%}",
            f"{1e3 * row['roofline_seconds']:.1f} ms, {row['bound']}",
            f"{row['allotted_bytes'] / topology.GIB:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"phases apart take {result['phases_to_step']:.2f} times the one program")
    for name, seconds in result["attention"].items():
        console.print(f"attention by {name}: {1e3 * seconds:.2f} ms")
    if FLAGS.out:
        storage.write_atomic(Path(FLAGS.out), json.dumps(result, indent=1, default=str).encode())


if __name__ == "__main__":
    runtime.run(main, sys.argv)
