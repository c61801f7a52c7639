"""DINOv2, DINOv3 and SigLIP against transformers, through the folders that it writes (the hub's names)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.parity.conftest import redraw
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.clip import longclip
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.clip.config import TextConfig, VisionConfig
from uae_jax.models.clip.model import CLIP
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov2.model import DINOv2
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.dinov3.model import DINOv3
from uae_jax.models.siglip.config import Config as SigLIPConfig
from uae_jax.models.siglip.model import SigLIP

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

V2 = DINOv2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, mlp_ratio=2, image_size=30, patch_size=6)
V3 = DINOv3Config(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    patch_size=6,
    num_register_tokens=2,
)
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
SIGLIP_VISION = SigLIPConfig(
    VisionConfig(**SIZES, image_size=20, patch_size=6, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
)
SIGLIP = SigLIPConfig(
    SIGLIP_VISION.vision,
    TextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=12, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    ),
    projection_size=24,
)  # fmt: skip
# name: class of transformers, config, ours, height and width of the images
CASES = {
    "dinov2": ("Dinov2Model", V2, DINOv2, (30, 30)),
    "dinov2_interpolated": ("Dinov2Model", V2, DINOv2, (20, 43)),
    "dinov2_swiglu": ("Dinov2Model", dataclasses.replace(V2, use_swiglu_ffn=True, qkv_bias=False), DINOv2, (18, 18)),
    "dinov2_registers": (
        "Dinov2WithRegistersModel", dataclasses.replace(V2, num_register_tokens=3), DINOv2, (20, 43),
    ),
    "dinov3": ("DINOv3ViTModel", V3, DINOv3, (20, 31)),
    "dinov3_gated": (
        "DINOv3ViTModel",
        dataclasses.replace(V3, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
        DINOv3,
        (24, 24),
    ),
    "siglip": ("SiglipModel", SIGLIP, SigLIP, (20, 20)),
    "siglip_vision": ("SiglipVisionModel", SIGLIP_VISION, SigLIP, (20, 20)),
}  # fmt: skip


def outputs(model, variables, pixels):
    """Ours as {"hidden", "pooled"}."""
    if isinstance(model, SigLIP):
        hidden, pooled = model.apply(variables, pixels, method="vision_hidden")
    else:
        hidden = model.apply(variables, pixels)
        pooled = hidden[..., 0, :]
    return {"hidden": hidden, "pooled": pooled}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    name, config, ours, size = CASES[request.param]
    where = tmp_path_factory.mktemp(request.param)
    kind = getattr(transformers, name)
    reference = kind(kind.config_class.from_dict(config.to_hf())).eval()
    redraw(reference)
    reference.save_pretrained(where)
    model = folder.load_model(where)
    assert model.config == config
    pixels = np.random.default_rng(0).standard_normal((3, *size, 3)).astype(np.float32)
    return reference, ours(model.config), {"params": model.params}, pixels, where


def torch_outputs(reference, x):
    vision = getattr(reference, "vision_model", reference)
    found = vision(x.permute(0, 3, 1, 2))
    return {"hidden": found.last_hidden_state, "pooled": found.pooler_output}


def test_outputs_and_gradient(case):
    reference, model, variables, pixels, _ = case
    x = torch.from_numpy(pixels).requires_grad_()
    expected = torch_outputs(reference, x)
    rng = np.random.default_rng(1)
    cotangent = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in expected.items()}
    sum((expected[k] * torch.from_numpy(c)).sum() for k, c in cotangent.items()).backward()

    def total(pixels):
        found = outputs(model, variables, pixels)
        return sum((found[k] * c).sum() for k, c in cotangent.items()), found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(pixels)
    for key, value in expected.items():
        assert found[key].shape == value.shape and value.abs().max() > 1
        np.testing.assert_allclose(found[key], value.detach().numpy(), rtol=0, atol=1e-4)
    # A sum of hundreds of terms: relative to its own size.
    scale = x.grad.abs().max().item()
    np.testing.assert_allclose(gradient / scale, x.grad.numpy() / scale, rtol=0, atol=1e-4)


def test_round_trip_and_init(case, tmp_path):
    _, model, variables, pixels, where = case
    folder.save_model(tmp_path, model.config, variables["params"])
    before, after = (load_file(path / "model.safetensors") for path in (where, tmp_path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]), name
    tokens = [jnp.zeros((1, 5), int)] if getattr(model.config, "text", None) else []
    fresh = jax.eval_shape(model.init, jax.random.key(0), pixels, *tokens)["params"]
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(np.shape, variables["params"])
    assert type(model.config).from_hf(model.config.to_hf()) == model.config


def test_leading_axes_are_free(case):
    _, model, variables, pixels, _ = case
    apply = jax.jit(lambda x: outputs(model, variables, x))
    grouped, flat = apply(pixels[:2].reshape(2, 1, *pixels.shape[1:])), apply(pixels[:2])
    for key, value in flat.items():
        assert grouped[key].shape == (2, 1, *value.shape[1:])
        np.testing.assert_allclose(grouped[key][:, 0], value, rtol=0, atol=1e-5)


def test_bfloat16_stays_near(case):
    _, model, variables, pixels, _ = case
    low = dataclasses.replace(model, dtype=jnp.bfloat16)
    exact, found = (jax.jit(lambda x, m=m: outputs(m, variables, x)["pooled"])(pixels) for m in (model, low))
    assert found.dtype == jnp.bfloat16
    cosine = (exact * found).sum(-1) / jnp.linalg.norm(exact, axis=-1) / jnp.linalg.norm(found.astype(float), axis=-1)
    assert cosine.min() > 0.99


def test_siglip_text(tmp_path):
    reference = transformers.SiglipModel(transformers.SiglipConfig.from_dict(SIGLIP.to_hf())).eval()
    redraw(reference)
    reference.save_pretrained(tmp_path)
    loaded = folder.load_model(tmp_path)
    rng = np.random.default_rng(0)
    tokens, pixels = rng.integers(0, 50, (4, 9)), rng.standard_normal((3, 20, 20, 3)).astype(np.float32)
    with torch.no_grad():
        out = reference(torch.from_numpy(tokens), torch.from_numpy(pixels).permute(0, 3, 1, 2))
        text = reference.text_model(torch.from_numpy(tokens)).pooler_output
    image, found, scale, bias = jax.jit(SigLIP(loaded.config).apply)({"params": loaded.params}, pixels, tokens)
    np.testing.assert_allclose(found, text.numpy(), rtol=0, atol=1e-4)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, found))
    np.testing.assert_allclose(scale * a @ b.T + bias, out.logits_per_image.numpy(), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="at most 12 tokens, not 13"):
        SigLIP(SIGLIP).apply({"params": loaded.params}, pixels, np.zeros((1, 13), int))


def test_longclip_reads_a_folder_of_248_positions_and_stretches_77(tmp_path):
    """The stretched table is torch's linear interpolation, and extrapolates at the end."""
    table = np.random.default_rng(0).standard_normal((77, 5)).astype(np.float32)
    long = longclip.stretched_positions(table)
    assert long.shape == (248, 5) and np.array_equal(long[:20], table[:20])
    later = torch.from_numpy(table[20:].T)[None]
    between = torch.nn.functional.interpolate(later, size=56 * 4 + 1, mode="linear", align_corners=True)[0].T.numpy()
    np.testing.assert_allclose(long[20 : 20 + 225], between, atol=1e-6)
    for k in range(4):
        np.testing.assert_allclose(long[244 + k], table[76] + k / 4 * (table[76] - table[75]), atol=1e-6)
    with pytest.raises(UserError, match="21 positions"):
        longclip.stretched_positions(table[:21])

    plain = CLIPConfig(
        VisionConfig(**SIZES, image_size=12, patch_size=6),
        TextConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3),
        projection_dim=16,
    )
    reference = transformers.CLIPModel(transformers.CLIPConfig.from_dict(plain.to_hf()))
    redraw(reference)
    reference.save_pretrained(tmp_path / "plain")
    config, params = longclip.stretched(*folder.load_model(tmp_path / "plain"))
    folder.save_model(tmp_path / "long", config, params)
    again = transformers.CLIPModel.from_pretrained(tmp_path / "long").eval()
    assert again.text_model.embeddings.position_embedding.weight.shape == (248, 24)
    tokens = np.random.default_rng(1).integers(0, 49, (2, 200))
    with torch.no_grad():
        expected = again.text_projection(again.text_model(torch.from_numpy(tokens)).pooler_output)
    found = jax.jit(lambda p, x: apply(CLIP(config), p, x, method="text_features"))(params, tokens)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)


def test_configs_of_other_models_are_refused():
    for config, other in ((DINOv2Config, "dinov3_vit"), (DINOv3Config, "dinov2"), (SigLIPConfig, "siglip2")):
        with pytest.raises(UserError, match=other):
            config.from_hf({"model_type": other})
    with pytest.raises(UserError, match="pooling head"):
        SigLIPConfig.from_hf({"model_type": "siglip_vision_model", "vision_use_head": False})
    with pytest.raises(UserError, match="image_size"):
        DINOv3Config.from_hf({"image_size": [224, 256]})
    with pytest.raises(UserError, match="relu"):
        DINOv2Config(hidden_act="relu")
    for ours, kind in ((DINOv2Config, "Dinov2Config"), (DINOv3Config, "DINOv3ViTConfig")):
        sparse = {"model_type": getattr(transformers, kind).model_type}
        assert ours.from_hf(sparse) == ours.from_hf(getattr(transformers, kind)().to_dict())
