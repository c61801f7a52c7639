"""Shared test set-up: CPU, float32 at the highest matmul precision, and the `slow` marker."""

import os
import tempfile

from tests import devices

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile much and run little; what one process has compiled, the others take from a folder that ends with them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", devices.QUICK)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="uae_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name

import jax
import pytest
from hypothesis import settings

from tests import tiny

jax.config.update("jax_default_matmul_precision", "highest")
# The same examples on every machine; --hypothesis-profile=explore draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore")
settings.load_profile("repeatable")


# Files that take longest: they go first, so that at the end no worker waits for another's.
LONGEST = (
    "step",
    "main",
    "hosts",
    "sharded_step",
    "plan",
    "lora",
    "autoregressive",
    "sharded_models",
    "plan_tpu",
    "faults",
)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; pass --run-slow"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with the weights of an untrained tiny system."""
    return tiny.write_weights(tmp_path_factory.mktemp("weights"))
