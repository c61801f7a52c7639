"""Qwen2.5-VL at its real sizes: counted, evaluated without memory, and compiled for a TPU without one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import qwen2_5_vl_3b, qwen2_5_vl_7b
from tests.test_qwen2_5_vl import from_manifest, manifest_of
from uae_jax import config as base
from uae_jax import lora, sharding
from uae_jax.convert import folder
from uae_jax.models.qwen2_5_vl.config import Config
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.prompts import Prompt, alike
from uae_jax.sampling.tokens import Sampling, Segment
from uae_jax.stages.coldstart import model_config
from uae_jax.umm import caption
from uae_jax.umm.diffusion import merge

ROOT = Path(__file__).parents[1]
CONFIGS = {"3b": qwen2_5_vl_3b, "7b": qwen2_5_vl_7b}
SIZE, ANSWER = 448, 128


def prompt_of(config: Config, images: jax.Array) -> Prompt:
    ids = [1, 2, 3, config.vision_start_token_id, config.image_token_id, config.vision_end_token_id, *range(20)]
    return alike(ids, images, config)


def abstract(name: str, batch: int) -> tuple[Qwen2_5_VL, dict, jax.ShapeDtypeStruct]:
    """The model in bfloat16, its parameters, and images: shapes only."""
    config = model_config(CONFIGS[name].get_config(), "captioner")
    model = Qwen2_5_VL(config, jnp.bfloat16)
    images = jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), jnp.float32)

    def init(images):
        p = prompt_of(config, images)
        positions, mask = jnp.moveaxis(p.positions, 1, 0), jnp.ones((1, 1), bool)
        return model.init(jax.random.key(0), p.patches, p.layout, p.tokens, positions, mask)["params"]

    params = jax.eval_shape(init, images)
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params), images


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_configs_and_counts(name):
    """Sizes in configs/ are the manifest's, and so is the number of parameters."""
    base.validate(CONFIGS[name].get_config())
    model, params, _ = abstract(name, 1)
    assert model.config == from_manifest(name)[0]
    assert sum(x.size for x in jax.tree.leaves(params)) == manifest_of(name)["n_params"]
    assert {"3b": 3_754_622_976, "7b": 8_292_166_656}[name] == manifest_of(name)["n_params"]


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_forward_evaluates(name):
    """448 pixels are 256 tokens; logits span the whole vocabulary; adapters count as they should."""
    model, params, images = abstract(name, 2)
    text = model.config.text

    def logits(params, images):
        p = prompt_of(model.config, images)
        last, cache = caption.prefill(model, params, p)
        return model.apply({"params": params}, last, method="logits"), cache

    found, cache = jax.eval_shape(logits, params, images)
    assert found.shape == (2, text.vocab_size) and found.dtype == jnp.float32
    slots = 26 - 1 + 256
    assert cache.k.shape == (text.num_layers, 2, slots, text.num_kv_heads, 128)
    adapters = jax.eval_shape(lambda p: lora.initial(p, 64, "language/layers/.*", jax.random.key(0)), params)
    d, width, kv = text.hidden_size, text.intermediate_size, text.num_kv_heads * 128
    per_layer = 4 * 2 * d - 2 * d + 2 * kv + 3 * (d + width)  # q and o: 2 d each; k and v: d + kv; three of the MLP
    assert sum(x.size for x in jax.tree.leaves(adapters)) == 64 * text.num_layers * per_layer


def compiled_sizes(topology: str) -> dict[str, float]:
    """Compiles scoring, its gradient for adapters, and sampling of the 3B; GiB per chip. In a process of its own."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 1, -1, 1), sharding.AXES)
    model, params, images = abstract("3b", len(devices))
    allowed = np.ones(model.config.text.vocab_size, bool)
    adapters = jax.eval_shape(lambda p: lora.initial(p, 64, "language/layers/.*", jax.random.key(0)), params)
    rules = folder.rules_of(model.config, mesh)
    placed = lambda tree: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        sharding.param_shardings(tree, mesh, rules),
    )
    split = NamedSharding(mesh, P("fsdp"))
    batched = lambda shape, dtype: jax.ShapeDtypeStruct((len(devices), *shape), dtype, sharding=split)  # noqa: E731
    images = batched(images.shape[1:], images.dtype)
    group = (4, ANSWER)
    answers = Segment(batched(group, jnp.int32), batched(group, jnp.bool_), batched(group, jnp.float32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (len(devices), 4)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split)

    def score(params, images, answers):
        seen = sharding.constrain_batch(images, mesh)
        return caption.log_probs(
            model, params, prompt_of(model.config, seen), answers, allowed=allowed, temperature=1.0, chunk=32
        )

    def gradient(adapters, params, images, answers):
        def total(adapters):
            return score(merge(params, lora.scaled(adapters, 64.0)), images, answers).sum()

        return jax.grad(total)(adapters)

    def write(params, images, keys):
        seen = prompt_of(model.config, sharding.constrain_batch(images, mesh))
        sampling = Sampling(ANSWER, (model.config.eos_token_id,))
        return caption.generate(model, params, seen, keys, allowed=allowed, sampling=sampling, mesh=mesh, rules=rules)

    sizes = {}
    for name, function, args in (
        ("score", score, (placed(params), images, answers)),
        ("gradient", gradient, (placed(adapters), placed(params), images, answers)),
        ("write", write, (placed(params), images, keys)),
    ):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        sizes[name] = memory.peak_memory_in_bytes / 2**30
        sizes[f"{name}/arguments"] = memory.argument_size_in_bytes / 2**30
    return sizes


@pytest.mark.slow
def test_compiles_for_a_tpu():
    """16 chips of 16 GB: weights are split, and scoring, training adapters and sampling fit."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    code = "import json; from tests import test_qwen2_5_vl_tpu as t; print(json.dumps(t.compiled_sizes('v5e:4x4')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    weights = manifest_of("3b")["n_params"] * 2 / 16 / 2**30
    assert weights < sizes["score/arguments"] < 1.2 * weights
    assert sizes["score"] < sizes["gradient"] < 15.75 and sizes["write"] < 15.75
    assert sizes["write"] > 15 * weights  # the token loop has all weights on every chip
