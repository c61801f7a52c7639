"""Every model, and the loss and gradients of a fixed trajectory, on eight virtual devices as on one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices, tiny
from uae_jax import sharding
from uae_jax.convert import folder
from uae_jax.models.clip.config import TextConfig, TextModelConfig, VisionConfig
from uae_jax.models.clip.model import CLIPText
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov2.model import DINOv2
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.dinov3.model import DINOv3
from uae_jax.models.flux.config import Config as FluxConfig
from uae_jax.models.flux.model import FluxTransformer
from uae_jax.models.siglip.config import Config as SiglipConfig
from uae_jax.models.siglip.model import SigLIP
from uae_jax.models.t5.config import Config as T5Config
from uae_jax.models.t5.model import T5Encoder
from uae_jax.models.vae.config import Config as VAEConfig
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.sampling.tokens import Segment
from uae_jax.umm import Family

ROOT = Path(__file__).parents[1]
MESHES = {"8x1": (8, 1, 1), "4x2": (4, 2, 1), "2x2x2": (2, 2, 2)}
B, G, T = 8, 2, 6
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = VisionConfig(**WIDTH, image_size=32, patch_size=16)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def models():
    """{name: (module, arguments with leading axis B)} of what the step's own test below does not run."""
    images, ids = draw(B, 32, 32, 3), jnp.arange(B * 5).reshape(B, 5) % 7
    flux = FluxConfig(16, 1, 1, 16, 2, 12, 8, True, axes_dims_rope=(4, 6, 6))
    return {
        "flux": (
            FluxTransformer(flux),
            (draw(B, 4, 4, 4), draw(B, 5, 12), draw(B, 8), draw(B) ** 2, ids > 1, jnp.full(B, 3.5)),
        ),
        "vae": (AutoencoderKL(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)), (images,)),
        "dinov2": (DINOv2(DINOv2Config.from_hf({**WIDTH, "image_size": 28, "patch_size": 14})), (images,)),
        "dinov3": (DINOv3(DINOv3Config.from_hf({**WIDTH, "num_register_tokens": 2})), (images,)),
        "siglip": (SigLIP(SiglipConfig(VISION, None, None)), (images,)),
        "t5": (T5Encoder(T5Config(32, 16, 8, 32, 2, 2)), (ids,)),
        "clip_text": (CLIPText(TextModelConfig(TextConfig(32, 32, 64, 2, 2, 8), 16)), (ids,)),
    }


def distance(a, b):
    """Largest difference between two trees, against the largest entry of the second where that is above 1."""
    found = [np.abs(np.asarray(x) - np.asarray(y)).max() / max(1.0, np.abs(y).max()) for x, y in zip(a, b, strict=True)]
    return float(max(found))


def against_norm(a, b):
    """Largest difference between two gradients, against the norm of the second: what an update's clipping sees."""
    norm = np.sqrt(sum((np.asarray(y, np.float64) ** 2).sum() for y in b))
    return float(max(np.abs(np.asarray(x) - np.asarray(y)).max() for x, y in zip(a, b, strict=True)) / norm)


def on_eight_devices(weights):
    """{mesh: {name: distance to one device}}; runs in a process of its own."""
    jax.config.update("jax_default_matmul_precision", "highest")
    sharding.SMALLEST_SHARDED = 0
    found = {name: {} for name in MESHES}
    config = {name: tiny.config(weights, **changes) for name, changes in settings().items()}
    meshes = {name: sharding.make_mesh(c, jax.devices()[: 1 if name == "one" else 8]) for name, c in config.items()}

    for name, (module, inputs) in models().items():
        params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
        call = lambda p, *x, module=module: jax.tree.leaves(module.apply({"params": p}, *x))  # noqa: E731
        expected = jax.device_get(jax.jit(call)(params, *inputs))
        mesh = meshes["2x2x2"]
        placed = sharding.place(params, mesh, folder.rules_of(module.config, mesh))
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed)), name
        split = [jax.device_put(x, sharding.batch_sharding(mesh, B)) for x in inputs]
        found["2x2x2"][name] = distance(jax.device_get(jax.jit(sharding.under(mesh, call))(placed, *split)), expected)

    results = {name: whole(c, meshes[name]) for name, c in config.items()}
    for name in MESHES:
        for what, expected in results["one"].items():
            found[name][what] = (against_norm if what == "gradient" else distance)(results[name][what], expected)
    found["norm"] = float(np.sqrt(sum((x**2).sum() for x in results["one"]["gradient"])))
    print(json.dumps(found))


def settings():
    shapes = {"one": (1, 1, 1), **MESHES}
    common = {"data__batch_size": B, "rl__group_size": G, "rl__max_tokens": T, "redraw__guidance": 2.0}
    return {
        name: common | {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
        for name, (data, fsdp, tensor) in shapes.items()
    }


def whole(config, mesh):
    """Redraws, their scores, and the loss and its gradients, of captions that are given."""
    from uae_jax import rewards, system
    from uae_jax.stages import rl
    from uae_jax.step import sample_keys

    built = system.load(config, mesh)
    state, _ = rl.start(config, built)
    family = Family(*built.family(config, mesh))
    images = jnp.asarray(tiny.scenes(B), jnp.float32) / 255.0
    rng = np.random.default_rng(0)
    length = rng.integers(2, T + 1, (B, G, 1))
    mask = np.arange(T) < length
    captions = Segment(
        np.where(mask, rng.choice(np.flatnonzero(built.allowed), (B, G, T)), 0), mask, np.zeros(mask.shape)
    )
    advantage = rng.normal(size=(B, G, 1)).astype(np.float32)
    batch = sharding.place_batch({"image": images, **{k: getattr(captions, k) for k in captions._fields}}, mesh)
    images, captions = batch.pop("image"), Segment(**batch)

    def loss(params, frozen, images, captions):
        scores = family.log_probs(params, frozen, images, {"caption": captions})["caption"]
        return (scores * advantage).sum() / captions.mask.sum(), scores

    def drawn(params, frozen, images, captions):
        keys = sample_keys(jax.random.key(0), jnp.int32(0), B, G)
        redrawn, _ = family.redraw(params, frozen, captions, images, keys)
        return redrawn, rewards.similarities(built.towers, frozen["towers"], images, redrawn)

    (value, scores), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        state.params, built.frozen, images, captions
    )
    redrawn, similar = jax.jit(drawn)(state.params, built.frozen, images, captions)
    out = {"loss": value, "log_probs": scores, "gradient": gradient, "redrawn": redrawn, "scores": similar}
    return {name: jax.device_get(jax.tree.leaves(x)) for name, x in out.items()}


@pytest.fixture(scope="module")
def found(weights):
    environment = devices.environment(8)
    code = f"from tests.test_sharded_models import on_eight_devices; on_eight_devices({str(weights)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["flux", "vae", "dinov2", "dinov3", "siglip", "t5", "clip_text"])
def test_outputs(found, name):
    assert found["2x2x2"][name] < 1e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("what", ["loss", "log_probs", "gradient", "redrawn", "scores"])
def test_loss_gradients_and_redraws(found, mesh, what):
    assert found[mesh][what] < 1e-5
    assert found["norm"] > 1, "or nothing has been compared"
