"""Every parameter of every model has a place on every mesh that the configs are meant for."""

import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from configs import qwen2_5_vl_7b, tiny_coldstart, uniworld_v1
from configs import uae_qwen2_5_vl_3b_sd3_5_large as uae
from uae_jax import config as base
from uae_jax import lora, optimizers, sharding
from uae_jax.convert import folder
from uae_jax.convert.table import param_shape
from uae_jax.errors import UserError
from uae_jax.models.clip.config import TextConfig, TextModelConfig, VisionConfig
from uae_jax.models.janus.config import Config as JanusConfig
from uae_jax.models.janus.config import VisionConfig as JanusVision
from uae_jax.models.janus.vq import VQConfig
from uae_jax.models.qwen2_5_vl.config import TextConfig as LanguageConfig
from uae_jax.models.siglip.config import Config as SiglipConfig
from uae_jax.models.t5.config import Config as T5Config
from uae_jax.sharding import COPIED, Split

VISION = VisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, image_size=512, patch_size=16)
LLAMA = LanguageConfig(102400, 4096, 11008, 30, 32, 32, 10000.0, (64,), False, attention_bias=False)
# A config of real size for each architecture: fields of its config.json, or our own.
REAL = {
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl_7b.CAPTIONER,
    "JanusForConditionalGeneration": JanusConfig(LLAMA, JanusVision(), VQConfig(projection_dim=4096)),
    "MultiModalityCausalLM": JanusConfig(LLAMA, JanusVision(), VQConfig(projection_dim=4096)),
    "SD3Transformer2DModel": uae.TRANSFORMER,
    "FluxTransformer2DModel": uniworld_v1.TRANSFORMER,
    "AutoencoderKL": uae.VAE,
    "JanusVQVAE": VQConfig(),
    "CLIPModel": uae.CLIP,
    "CLIPTextModel": TextModelConfig(TextConfig(), None),
    "CLIPTextModelWithProjection": TextModelConfig(TextConfig(), 768),
    "Dinov2Model": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518},
    "Dinov2WithRegistersModel": {"model_type": "dinov2_with_registers"},
    "DINOv3ViTModel": {
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "use_gated_mlp": True,
    },
    "SiglipModel": SiglipConfig(VISION, TextConfig(vocab_size=256000, hidden_size=1152), 1152),
    "SiglipVisionModel": SiglipConfig(VISION, None, None),
    "T5EncoderModel": T5Config(),
    "Projector": {"kind": "uae"},
    "CellClassifier": tiny_coldstart.get_config().models.judge.to_dict(),
}


def sizes(fsdp, tensor, data=1, slices=1):
    return {"slice": slices, "data": data, "fsdp": fsdp, "tensor": tensor}


def config_of(kind):
    found = REAL[kind]
    return folder.ARCHITECTURES[kind].config.from_hf(found) if isinstance(found, dict) else found


def specs(kind, fsdp, tensor):
    """{path: (shape, where it is stored)} of a model's parameters."""
    known, config = folder.ARCHITECTURES[kind], config_of(kind)
    rules, mesh = known.rules(config, tensor), sizes(fsdp, tensor)
    shapes = {entry.path: param_shape(entry) for entry in known.table(config)}
    return {path: (shape, sharding.param_spec(path, shape, mesh, rules)) for path, shape in shapes.items()}


def axes_of(spec):
    return [axis for part in spec if part for axis in ([part] if isinstance(part, str) else part)]


@pytest.mark.parametrize("kind", folder.ARCHITECTURES)
def test_every_parameter_is_stored_in_parts(kind):
    """All that is large is split over every device, but for a dimension that does not divide by as many."""
    for fsdp, tensor in ((8, 1), (16, 2), (4, 4), (64, 4)):
        for path, (shape, spec) in specs(kind, fsdp, tensor).items():
            assert len(set(axes_of(spec))) == len(axes_of(spec)), path
            if math.prod(shape) < 2**20 or path.endswith(("bias", "scale")):
                continue
            could = any(size % (fsdp * tensor) == 0 for size in shape)
            assert not could or set(axes_of(spec)) == {a for a in ("fsdp", "tensor") if sizes(fsdp, tensor)[a] > 1}, (
                path,
                shape,
                spec,
            )


def test_the_language_model_is_split_by_heads_widths_and_words():
    found = specs("Qwen2_5_VLForConditionalGeneration", 8, 4)
    path = "language/layers"
    assert {name: spec for name, (_, spec) in found.items() if "tensor" in spec} == {
        "language/embed_tokens/embedding": P("tensor", "fsdp"),
        "language/lm_head/kernel": P("fsdp", "tensor"),
        f"{path}/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
        f"{path}/self_attn/k_proj/kernel": P(None, "fsdp", "tensor"),
        f"{path}/self_attn/v_proj/kernel": P(None, "fsdp", "tensor"),
        f"{path}/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
        f"{path}/mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
        f"{path}/mlp/up_proj/kernel": P(None, "fsdp", "tensor"),
        f"{path}/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
    }
    # 28 heads, 4 key heads, 152064 words: 8 divides none but the words.
    wider = specs("Qwen2_5_VLForConditionalGeneration", 8, 8)
    assert wider[f"{path}/self_attn/q_proj/kernel"][1] == P(None, ("fsdp", "tensor"), None)
    assert wider["language/embed_tokens/embedding"][1] == P("tensor", "fsdp")
    # 14 of 28 heads a device, but 4 key heads do not make 14 parts.
    many = specs("Qwen2_5_VLForConditionalGeneration", 8, 14)
    assert many[f"{path}/self_attn/q_proj/kernel"][1] == P(None, "fsdp", "tensor")
    assert "tensor" not in many[f"{path}/self_attn/k_proj/kernel"][1]


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel", "AutoencoderKL", "CLIPModel"])
def test_what_draws_and_scores_takes_no_tensor_parallelism(kind):
    known, config = folder.ARCHITECTURES[kind], config_of(kind)
    rules = known.rules(config, 4)
    assert {sharding.split_of(entry.path, rules) for entry in known.table(config)} == {Split.GATHERED, Split.COPIED}


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="encoder/novel/thing"):
        sharding.param_spec("encoder/novel/thing", (4096, 4096), sizes(2, 2), COPIED)
    with pytest.raises(ValueError, match="novel/kernel"):
        sharding.param_shardings({"novel": {"lora_a": jnp.ones((3, 4))}}, mesh_of(1, 1), COPIED)


def mesh_of(fsdp, tensor):
    return SimpleNamespace(shape=sizes(fsdp, tensor))


def test_adapters_and_optimizer_state_follow_their_kernels():
    known, config = (
        folder.ARCHITECTURES["Qwen2_5_VLForConditionalGeneration"],
        config_of("Qwen2_5_VLForConditionalGeneration"),
    )
    mesh = sizes(8, 4)
    rules = (*sharding.below("encoder", known.rules(config, 4)), *optimizers.RULES)
    shapes = {e.path: jax.ShapeDtypeStruct(param_shape(e), jnp.float32) for e in known.table(config)}
    params = traverse_util.unflatten_dict(shapes, sep="/")
    adapters = jax.eval_shape(lambda p: lora.initial(p, 64, "language/layers/.*", jax.random.key(0)), params)
    found = {
        path: sharding.param_spec(f"encoder/{path}", x.shape, mesh, rules)
        for path, x in traverse_util.flatten_dict(adapters, sep="/").items()
    }
    layer = "language/layers"
    assert found[f"{layer}/mlp/down_proj/lora_a"] == P(None, "tensor", "fsdp")
    assert found[f"{layer}/mlp/gate_proj/lora_b"] == P(None, "fsdp", "tensor")
    assert found[f"{layer}/mlp/gate_proj/lora_a"] == P(None, ("fsdp", "tensor"), None)
    for name in ("adamw", "muon"):
        optimizer = optimizers.make(base.optimizer(name, 1e-3), lambda _: 1e-3)
        state = jax.eval_shape(optimizer.init, {"encoder": adapters})
        moments = 0
        for at, leaf in jax.tree_util.tree_leaves_with_path(state):
            path = jax.tree_util.keystr(at, simple=True, separator="/")
            spec = sharding.param_spec(path, leaf.shape, mesh, rules) if leaf.ndim else P()
            if "encoder/" in path:
                assert spec == found[path.split("encoder/")[1]], path
                moments += 1
            else:
                assert spec == P()
        assert moments == {"adamw": 2, "muon": 1}[name] * len(found)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh, b, g, expected",
    [
        (sizes(8, 1), 8, 4, (("fsdp",), ())),
        (sizes(8, 2, data=2, slices=2), 64, 8, (("slice", "data", "fsdp"), ())),
        (sizes(64, 1, data=8), 64, 8, (("fsdp",), ("data",))),  # 512 chips, 64 images
        (sizes(4, 1, data=8), 8, 4, (("data",), ("fsdp",))),
        (sizes(4, 1, data=8), 12, 3, (("fsdp",), ())),  # nothing takes data
        (sizes(1, 4), 3, 3, ((), ())),
    ],
)
def test_batch_axes(mesh, b, g, expected):
    assert sharding.batch_axes(SimpleNamespace(shape=mesh), b, g) == expected


def test_the_tensor_axis_splits_what_no_weights_are_split_for():
    mesh = SimpleNamespace(shape=sizes(4, 2, data=2))
    assert sharding.batch_axes(mesh, 4, 4) == (("fsdp",), ("data",))
    assert sharding.batch_axes(mesh, 4, 4, spare=True) == (("fsdp",), ("data", "tensor"))
    assert sharding.batch_axes(mesh, 4, 2, spare=True) == (("fsdp",), ("data",))
    assert sharding.group_ways(mesh, 4, 4, spare=True) == 4 and sharding.group_ways(None, 4, 4) == 1


def test_parts_are_strided():
    x = jnp.arange(12).reshape(6, 2)
    parts = sharding.split_parts(x, 3)
    assert parts.shape == (3, 2, 2) and parts[0, :, 0].tolist() == [0, 6]
    assert (sharding.join_parts(parts) == x).all()
    for axis, count in ((0, 3), (1, 2), (0, 1)):
        assert (sharding.in_parts(lambda y: y + 1, x, count, axis) == x + 1).all()


# ---- the configs of real size ----------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
TABLES = ("uae_qwen2_5_vl_3b_sd3_5_large", "uniworld_v1", "janus_pro_1b", "janus_pro_7b")


def rows(name):
    """(chips, mesh, batch, rollout microbatches) of the table in a config's docstring; k slices are 2 and 4."""
    lines = re.findall(r"^    \| (?!topology)(.*) \|$", importlib.import_module(f"configs.{name}").__doc__, re.M)
    assert len(lines) >= 8
    for line in lines:
        topology, chips, mesh, batch, rollout = (cell.strip() for cell in line.split("|"))
        for k in (2, 4) if "k" in chips else (1,):
            number = lambda text, k=k: int(re.sub("k$", "", text)) * (k if text.endswith("k") else 1)  # noqa: E731
            found = {axis: k if size == "k" else int(size) for axis, size in re.findall(r"(\w+)=(-?\w+)", mesh)}
            yield topology, number(chips), found, number(batch), int(rollout)


@pytest.mark.parametrize("name", TABLES)
def test_the_meshes_of_the_configs_fit_their_batches(name):
    for topology, chips, mesh, batch, rollout in rows(name):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.data.batch_size, config.rl.rollout_microbatches = batch, rollout
        config.eval.enabled = False
        base.validate(config)
        shape = {axis: mesh.get(axis, 1) for axis in sharding.AXES}
        known = math.prod(size for size in shape.values() if size > 0)
        shape = {axis: chips // known if size == -1 else size for axis, size in shape.items()}
        assert math.prod(shape.values()) == chips, topology
        sharding.check_batches(config, SimpleNamespace(shape=shape))
        assert shape["tensor"] == 1 or shape["tensor"] <= {"uniworld_v1": 4, "janus_pro_7b": 4}.get(name, 2)
    config.data.batch_size = config.rl.group_size = 3
    config.rl.rollout_microbatches = 1
    with pytest.raises(UserError, match=r"config.data.batch_size .* = 3 images"):
        sharding.check_batches(config, SimpleNamespace(shape=sizes(8, 1)))


def meshes_of_tpus():
    """Every TPU row of the tables as a mesh of its topology; runs in a process of its own."""
    from jax.experimental import topologies

    for name in TABLES:
        for topology, chips, mesh, batch, rollout in rows(name):
            if not topology.startswith("v"):
                continue
            config = importlib.import_module(f"configs.{name}").get_config()
            config.data.batch_size, config.rl.rollout_microbatches = batch, rollout
            config.eval.batch_size = chips
            with config.unlocked():
                config.mesh = mesh
            slices = {"num_slices": mesh["slice"]} if "slice" in mesh else {}
            devices = topologies.get_topology_desc(topology.split(",")[0], "tpu", **slices).devices
            found = sharding.make_mesh(config, devices)
            assert found.devices.size == chips and len({d.id for d in found.devices.flat}) == chips
            for i, part in enumerate(found.devices if slices else ()):
                assert {d.slice_index for d in part.flat} == {i}


@pytest.mark.slow
def test_meshes_of_the_configs_on_their_topologies():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install 'uae_jax[tpu]'")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    code = "from tests.test_sharding_rules import meshes_of_tpus; meshes_of_tpus()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", TABLES)
def test_configs_of_real_size(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    base.validate(config)
    assert config.is_locked
    for part, fields in config.models.items():
        known = folder.ARCHITECTURES[folder.architecture(fields.to_dict())]
        assert known.table(known.config.from_hf(fields.to_dict())), part
    small = module.get_config("runlocal")
    base.validate(small)
    assert "models" not in small and small.lora.rank == 4
    assert small.weights == ("tiny_ar" if name.startswith("janus") else "")
    assert small.redraw.guidance == config.redraw.guidance
