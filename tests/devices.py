"""How tests compile for the CPU, and processes with virtual CPU devices, for what is run on a mesh."""

import os

# With XLA's newer way to emit fusions, tests take half as long again. An option that XLA does not know is ignored.
QUICK = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
THREADS = 8  # a device: XLA's default is one, and a collective holds the thread on which it waits for the others
PATIENCE = 600  # seconds that devices wait for each other: they share the cores with whatever else is tested


def environment(count: int, **further: str) -> dict[str, str]:
    """Variables of a process that shall have `count` devices, to be set before jax looks for them."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={count} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={PATIENCE}",
        "PJRT_NPROC": str(THREADS * count),
        **further,
    }
