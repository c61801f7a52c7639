"""Janus-Pro at its real sizes: names and shapes, counts, prompts, and compiled for a TPU without one."""

import dataclasses
import gzip
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
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import janus_pro_1b, janus_pro_7b
from uae_jax import config as base
from uae_jax import sharding
from uae_jax.convert import folder
from uae_jax.convert.table import flat_names, mismatches, param_shape
from uae_jax.models.janus import original
from uae_jax.models.janus import weights as hub
from uae_jax.models.janus.config import Config
from uae_jax.models.janus.model import Janus
from uae_jax.sampling.tokens import Sampling, Segment
from uae_jax.stages.coldstart import model_config
from uae_jax.step import STARTING_WEIGHTS
from uae_jax.umm import autoregressive, caption
from uae_jax.umm.prompts import Prompts

ROOT = Path(__file__).parents[1]
MANIFESTS = Path(__file__).parents[2] / "shared/manifests"
CONFIGS = {"1b": janus_pro_1b, "7b": janus_pro_7b}
COUNTS = {"1b": 2_076_600_000, "7b": 7_407_800_000}  # to five digits
WORDS = 64  # tokens of a caption; prompts of 32 and 16 tokens besides the image


def manifest_of(name):
    path = MANIFESTS / f"janus_pro_{name}.json.gz"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    return json.loads(gzip.decompress(path.read_bytes()))


def abstract(name: str, dtype=jnp.bfloat16) -> tuple[Janus, dict]:
    """The model in bfloat16 and its parameters: shapes only."""
    config = model_config(CONFIGS[name].get_config(), "janus")
    model = Janus(config, jnp.bfloat16)
    images = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, jax.ShapeDtypeStruct((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


@pytest.mark.parametrize("name", ["1b", "7b"])
def test_table_equals_the_manifest_and_the_model(name):
    manifest = manifest_of(name)
    config = Config.from_hf(manifest["config"])
    table = hub.table(config)
    assert mismatches(table, {tensor: tuple(shape) for tensor, shape in manifest["tensors"].items()}) == []
    model, params = abstract(name)
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes == {entry.path: param_shape(entry) for entry in table}
    assert sum(x.size for x in jax.tree.leaves(params)) == manifest["n_params"]
    # The manifest's config leaves the special tokens at transformers' defaults.
    tokens = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert dataclasses.replace(config, **tokens) == model.config


@pytest.mark.parametrize("name", ["1b", "7b"])
def test_original_names(name):
    """deepseek-ai's config.json gives the same sizes; its tensors have the names and shapes of its repository."""
    model, params = abstract(name)
    text, width = model.config.text, model.config.text.hidden_size
    projector = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    head = {"image_token_embed": width, "image_token_size": 16384, "n_embed": width}
    tower = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    values = {
        "model_type": "multi_modality",
        "aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 1024, **projector}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {"input_dim": 8, **projector}},
        "gen_head_config": {"cls": "vision_head", "params": head},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "vision_config": {"cls": "CLIPVisionTower", "params": tower},
        "language_config": {
            "hidden_size": width,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": 16384,
            "model_type": "llama",
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "torch_dtype": "bfloat16",
            "vocab_size": 102400,
        },
    }
    config = original.from_hf(values)
    assert config == model.config
    table = original.table(config)
    shapes = {entry.path: param_shape(entry) for entry in table}
    assert shapes == {path: x.shape for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    found = {tensor: entry.shape for entry in table for tensor in flat_names(entry.names)}
    expected = {
        "vision_model.vision_tower.blocks.23.attn.qkv.weight": (3072, 1024),
        "vision_model.vision_tower.blocks.0.attn.qkv.bias": (3072,),
        "vision_model.vision_tower.pos_embed": (1, 576, 1024),
        "aligner.layers.2.weight": (width, width),
        "gen_aligner.layers.0.weight": (width, 8),
        "gen_embed.weight": (16384, 8),
        "gen_head.output_mlp_projector.weight": (width, width),
        "gen_head.vision_head.bias": (16384,),
        "gen_vision_model.quantize.embedding.weight": (16384, 8),
        "gen_vision_model.encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "gen_vision_model.decoder.conv_blocks.0.attn.2.proj_out.weight": (512, 512, 1, 1),
        "gen_vision_model.decoder.mid.1.q.weight": (512, 512, 1, 1),
        f"language_model.model.layers.{text.num_layers - 1}.mlp.down_proj.weight": (width, text.intermediate_size),
        "language_model.lm_head.weight": (102400, width),
    }
    assert expected.items() <= found.items()
    starts = ("vision_model.", "aligner.", "gen_", "language_model.")
    assert all(tensor.startswith(starts) for tensor in found)


@pytest.mark.parametrize("name", ["1b", "7b"])
def test_configs(name):
    """They are valid, have the published number of parameters, and ask for one image each way."""
    config = CONFIGS[name].get_config()
    base.validate(config)
    _, params = abstract(name)
    assert abs(sum(x.size for x in jax.tree.leaves(params)) - COUNTS[name]) < 1e5
    prompt = config.prompt
    assert prompt.caption.count("<image_placeholder>") == 1 and prompt.caption.endswith("\n\n<|Assistant|>:")
    drawn = f"{prompt.redraw_prefix} a red cube{prompt.redraw_suffix}"
    assert drawn == "<｜begin▁of▁sentence｜><|User|>: a red cube\n\n<|Assistant|>:<begin_of_image>"


def prompts_of(config: Config) -> Prompts:
    return Prompts(
        caption=(*range(30), config.boi_token_id, config.image_token_id),
        redraw_prefix=(config.bos_token_id, 1, 2),
        redraw_suffix=(3, config.boi_token_id),
        negative=(),
        end_token=config.eos_token_id,
    )


def compiled_sizes(topology: str, name: str) -> dict[str, float]:
    """Compiles writing captions and drawing with guidance, an image and 4 samples a chip; GiB. In its own process."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).reshape(1, 1, -1, 1), sharding.AXES)
    model, params = abstract(name)
    config, prompts, b, g = model.config, prompts_of(model.config), len(devices), 4
    rules = folder.rules_of(config, mesh)
    shardings = sharding.param_shardings(params, mesh, rules)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    split = NamedSharding(mesh, P("fsdp"))

    def batched(shape, dtype):
        return jax.ShapeDtypeStruct((b, *shape), dtype, sharding=split)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (b, g)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=split)
    images = batched((config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    allowed = np.ones(config.text.vocab_size, bool)

    def write(params, images, keys):
        prompt = autoregressive.about(sharding.constrain_batch(images, mesh), prompts, config)
        sampling = Sampling(WORDS, (config.eos_token_id,))
        return caption.generate(model, params, prompt, keys, allowed=allowed, sampling=sampling, mesh=mesh, rules=rules)

    settings = CONFIGS[name].get_config()
    settings.redraw.guidance = 5.0
    family = autoregressive.build(model, prompts, allowed, settings, mesh)

    def draw(params, captions, length, keys):
        captions = Segment(captions, jnp.arange(WORDS) < length[..., None], jnp.zeros(captions.shape))
        return family.redraw(STARTING_WEIGHTS, {"start": params}, captions, None, keys)[0]

    sizes = {}
    for what, function, args in (
        ("write", write, (params, images, keys)),
        ("draw", draw, (params, batched((g, WORDS), jnp.int32), batched((g,), jnp.int32), keys)),
    ):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        sizes[what] = memory.peak_memory_in_bytes / 2**30
        sizes[f"{what}/arguments"] = memory.argument_size_in_bytes / 2**30
    return sizes


@pytest.mark.slow
def test_compiles_for_a_tpu():
    """16 chips of 16 GB: the weights of the 1B are split; writing captions, and drawing them with guidance, fit."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    code = "import json; from tests import test_janus_tpu as t; print(json.dumps(t.compiled_sizes('v5e:4x4', '1b')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    _, params = abstract("1b")
    read = {"write": ("visual", "aligner", "language"), "draw": ("language", "gen_embed", "gen_aligner", "gen_head")}
    for what, parts in read.items():
        weights = sum(x.size for part in parts for x in jax.tree.leaves(params[part])) * 2 / 16 / 2**30
        assert 0.8 * weights < sizes[f"{what}/arguments"] < 1.1 * weights  # drawing reads no head for text
        assert 15 * weights < sizes[what] < 5  # the token loop has all weights on every chip
