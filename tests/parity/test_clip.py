"""CLIP against transformers' CLIPModel."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax.convert.table import load, save
from uae_jax.errors import UserError
from uae_jax.models.clip.config import Config, TextConfig, VisionConfig
from uae_jax.models.clip.model import CLIP
from uae_jax.models.clip.weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

TINY = Config(
    # 20 pixels hold three patches of 6, and a rest.
    VisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=20,
        patch_size=6,
    ),
    TextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=12,
    ),
    projection_dim=20,
)


def variant(eos_token_id: int, hidden_act: str) -> Config:
    return dataclasses.replace(
        TINY,
        vision=dataclasses.replace(TINY.vision, hidden_act=hidden_act),
        text=dataclasses.replace(TINY.text, hidden_act=hidden_act, eos_token_id=eos_token_id),
    )


def build(config: Config):
    """The reference with every parameter re-drawn, and ours with its weights."""
    reference = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config.to_hf())).eval()
    redraw(reference)
    reference.logit_scale.data += 1
    return reference, CLIP(config), {"params": load(table(config), tensors(reference))}


def draw(batch: tuple[int, ...] = (4,)) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and token ids; each row holds 40 twice, and the highest id, 49, elsewhere (also twice)."""
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((*batch, 20, 20, 3)).astype(np.float32)
    rows = np.stack([rng.permutation(11) for _ in range(int(np.prod(batch)))])
    tokens = np.choose(np.minimum(rows, 4), [40, 40, 49, 49, 0]) + (rows >= 4) * rng.integers(0, 40, rows.shape)
    return pixels, tokens.reshape(*batch, 11)


@pytest.fixture(scope="module")
def tiny():
    return build(TINY)


@pytest.mark.parametrize(("eos", "act"), [(2, "quick_gelu"), (40, "gelu"), (40, "gelu_pytorch_tanh")])
def test_features_and_hidden_states(eos, act):
    config = variant(eos, act)
    reference, model, variables = build(config)
    pixels, tokens = draw()
    with torch.no_grad():
        vision = reference.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        image = reference.visual_projection(vision.pooler_output)
        text = reference.text_projection(reference.text_model(torch.from_numpy(tokens)).pooler_output)
        logits = reference(torch.from_numpy(tokens), torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits_per_image

    def run(variables, pixels, tokens):
        return model.apply(variables, pixels, tokens), model.apply(variables, pixels, method="vision_hidden")

    (found_image, found_text, scale), (hidden, pooled) = jax.jit(run)(variables, pixels, tokens)
    assert np.abs(text.numpy()).max() > 1 and np.abs(image.numpy()).max() > 1
    for x, y in (
        (found_image, image),
        (found_text, text),
        (hidden, vision.last_hidden_state),
        (pooled, vision.pooler_output),
    ):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y.numpy(), rtol=0, atol=1e-4)
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (found_image, found_text))
    np.testing.assert_allclose(scale * a @ b.T, logits.numpy(), rtol=0, atol=1e-4)


def test_epsilon_of_the_norms():
    """Embeddings so small that the norms' epsilon matters."""
    reference, model, _ = build(TINY)
    pixels, tokens = draw()
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if "embedding" in name:
                p.mul_(0.003)
        image = reference.visual_projection(
            reference.vision_model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
        )
        text = reference.text_projection(reference.text_model(torch.from_numpy(tokens)).pooler_output)
    found = jax.jit(model.apply)({"params": load(table(TINY), tensors(reference))}, pixels, tokens)
    np.testing.assert_allclose(found[0], image.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[1], text.numpy(), rtol=0, atol=1e-4)


def test_eos_token_decides_where_text_is_read(tiny):
    _, _, variables = tiny
    _, tokens = draw()
    highest, first = (
        CLIP(variant(eos, "quick_gelu")).apply(variables, tokens, method="text_features") for eos in (2, 40)
    )
    assert np.abs(highest - first).max(axis=-1).min() > 1e-2
    # What stands behind the end is not seen.
    end = (tokens == 40).argmax(-1)
    cut = np.where(np.arange(11) > end[:, None], 7, tokens)
    again = CLIP(variant(40, "quick_gelu")).apply(variables, cut, method="text_features")
    np.testing.assert_array_equal(again, first)


def test_gradient_of_the_reward(tiny):
    """The gradient of the image embedding, which a trained decoder follows."""
    reference, model, variables = tiny
    pixels, _ = draw()
    cotangent = np.random.default_rng(1).standard_normal((4, 20)).astype(np.float32)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).requires_grad_()
    features = reference.visual_projection(reference.vision_model(x).pooler_output)
    (features * torch.from_numpy(cotangent)).sum().backward()
    found = jax.jit(jax.grad(lambda p: (model.apply(variables, p, method="image_features") * cotangent).sum()))(pixels)
    np.testing.assert_allclose(found, x.grad.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


def test_round_trip_is_bit_identical_and_fits_init(tiny):
    reference, model, variables = tiny
    saved, expected = save(table(TINY), variables["params"]), tensors(reference)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and np.array_equal(saved[name], value), name
    fresh = jax.eval_shape(model.init, jax.random.key(0), *draw())
    assert jax.tree.map(lambda x: x.shape, fresh["params"]) == jax.tree.map(np.shape, variables["params"])
    assert set(fresh["params"]) == {"vision", "text", "visual_projection", "text_projection", "logit_scale"}


def test_scalar_stays_a_scalar(tiny):
    _, _, variables = tiny
    assert save(table(TINY), variables["params"])["logit_scale"].shape == ()


def test_leading_axes_are_free(tiny):
    _, model, variables = tiny
    pixels, tokens = draw((2, 3))
    apply = jax.jit(model.apply)
    grouped = apply(variables, pixels, tokens)
    flat = apply(variables, pixels.reshape(6, 20, 20, 3), tokens.reshape(6, 11))
    for x, y in zip(grouped[:2], flat[:2], strict=True):
        assert x.shape == (2, 3, 20)
        np.testing.assert_allclose(x.reshape(6, 20), y, rtol=0, atol=1e-5)


def test_config():
    config = variant(40, "gelu")
    assert Config.from_hf(config.to_hf()) == config
    assert Config.from_hf(transformers.CLIPConfig.from_dict(config.to_hf()).to_dict()) == config
    # A published config leaves out what equals transformers' defaults.
    sparse = Config.from_hf({"text_config": {"eos_token_id": 2}, "vision_config": {"patch_size": 16}})
    full = transformers.CLIPConfig(text_config={"eos_token_id": 2}, vision_config={"patch_size": 16}).to_dict()
    assert sparse == Config.from_hf(full)
    with pytest.raises(UserError, match="siglip"):
        Config.from_hf({**config.to_hf(), "model_type": "siglip"})
    with pytest.raises(UserError, match="text_config"):
        Config.from_hf({"vision_config": {"patch_size": 16}})
    with pytest.raises(UserError, match="hidden_act 'relu'"):
        variant(40, "relu")


def test_inputs_of_another_size(tiny):
    _, model, variables = tiny
    pixels, tokens = draw()
    with pytest.raises(UserError, match="18x20x3"):
        model.apply(variables, pixels[:, :18], tokens)
    with pytest.raises(UserError, match="at most 12 tokens, not 22"):
        model.apply(variables, pixels, np.tile(tokens, (1, 2)))
