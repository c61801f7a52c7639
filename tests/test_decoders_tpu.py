"""The MM-DiTs at their real sizes: counted, and whole sampled latents compiled for a TPU without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from uae_jax import sharding
from uae_jax.convert import folder
from uae_jax.models import apply
from uae_jax.models.flux.config import Config as FluxConfig
from uae_jax.models.flux.model import FluxTransformer
from uae_jax.models.sd3.config import Config as SD3Config
from uae_jax.models.sd3.model import SD3Transformer
from uae_jax.sampling import flow
from uae_jax.sampling.scheduler import Scheduler

ROOT = Path(__file__).parents[1]
SD3_LARGE = SD3Config(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    num_layers=38,
    attention_head_dim=64,
    num_attention_heads=38,
    joint_attention_dim=4096,
    caption_projection_dim=2432,
    pooled_projection_dim=2048,
    out_channels=16,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)
FLUX_DEV = FluxConfig(
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
# With SD3's table of positions, which torch does not count as a parameter.
COUNTS = {"sd3_5_large": 8_056_627_520 + 192**2 * 2432, "flux_1_dev": 11_901_408_320}
SIDE, TEXT = 64, 256  # latents of 512 pixels, a long caption


def model_of(name: str) -> tuple[Any, int]:
    """The model in bfloat16, and the width of its pooled text."""
    if name == "flux_1_dev":
        return FluxTransformer(FLUX_DEV, jnp.bfloat16), FLUX_DEV.pooled_projection_dim
    return SD3Transformer(SD3_LARGE, jnp.bfloat16), SD3_LARGE.pooled_projection_dim


def guidance_of(name: str, batch: int) -> tuple:
    """What FLUX takes besides: no mask, and a scale."""
    return (None, jnp.full(batch, 3.5)) if name == "flux_1_dev" else ()


def abstract_params(name: str) -> Any:
    model, pooled = model_of(name)
    shapes = (1, SIDE, SIDE, 16), (1, TEXT, 4096), (1, pooled), (1,)

    def init():
        return model.init(jax.random.key(0), *map(jnp.zeros, shapes), *guidance_of(name, 1))["params"]

    return jax.eval_shape(init)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    assert sum(x.size for x in jax.tree.leaves(abstract_params(name))) == COUNTS[name]


def compiled_sizes(name: str, topology: str) -> dict[str, float]:
    """Compiles twenty steps, an image a chip (SD3's guided: a doubled batch); GiB per chip. In a process of its own."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 1, -1, 1), sharding.AXES)
    model, width = model_of(name)
    params = abstract_params(name)
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
        params,
        sharding.param_shardings(params, mesh, folder.rules_of(model.config, mesh)),
    )
    n = len(devices)
    guided = name == "sd3_5_large"
    lead, split = ((2,), P(None, "fsdp")) if guided else ((), P("fsdp"))
    noise = jax.ShapeDtypeStruct((n, SIDE, SIDE, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text, pooled = (
        jax.ShapeDtypeStruct((*lead, n, *shape), jnp.bfloat16, sharding=NamedSharding(mesh, split))
        for shape in ((TEXT, 4096), (width,))
    )
    scheduler = Scheduler(shift=3.0, use_dynamic_shifting=not guided)
    levels = scheduler.sigmas(20, "diffusers" if guided else "uniform", (SIDE // 2) ** 2)

    def draw(params, noise, text, pooled):
        def velocity(x, sigma):
            timestep = jnp.broadcast_to(sigma * 1000, (*lead, n))
            latents = jnp.broadcast_to(x, (*lead, *x.shape)).astype(jnp.bfloat16)
            found = apply(model, params, latents, text, pooled, timestep, *guidance_of(name, n))
            return flow.guided(found[0], found[1], 4.5) if guided else found

        return flow.euler(velocity, noise, levels)

    lowered = jax.jit(sharding.under(mesh, draw)).lower(params, noise, text, pooled)
    memory = lowered.compile().memory_analysis()
    return {
        "peak": memory.peak_memory_in_bytes / 2**30,
        "arguments": memory.argument_size_in_bytes / 2**30,
        "kernels": lowered.as_text().count("tpu_custom_call"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_twenty_steps_compile_for_a_tpu(name):
    """16 chips of 16 GB: weights are split, and one scan of twenty steps fits."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    call = f"compiled_sizes({name!r}, 'v5e:4x4')"
    code = f"import json; from tests.test_decoders_tpu import compiled_sizes; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    weights = COUNTS[name] * 2 / 16 / 2**30
    assert weights < sizes["arguments"] < 1.2 * weights
    assert sizes["arguments"] < sizes["peak"] < 15.75
    assert sizes["kernels"] > 0, "attention is to be the TPU's kernel"
