"""Processing on the device against the towers' own image processors (PIL), or the resampling of torch that they use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from uae_jax import pixels
from uae_jax.models import resample
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.clip.config import VisionConfig
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.siglip.config import Config as SigLIPConfig

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
pytest.importorskip("transformers", reason="pip install '.[parity]'")
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CASES = {
    "clip": (CLIPConfig(), CLIPImageProcessorPil()),
    "clip_336": (
        CLIPConfig(VisionConfig(image_size=336)),
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    ),
    "dinov2": (DINOv2Config(), BitImageProcessorPil(size={"shortest_edge": 256}, **IMAGENET)),
    "siglip": (
        SigLIPConfig(VisionConfig(image_size=384, patch_size=16)),
        SiglipImageProcessorPil(size={"height": 384, "width": 384}),
    ),
}


def picture(height: int, width: int) -> np.ndarray:
    """uint8: smooth colours, hard edges at which a cubic overshoots, and noise."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.sin(x / 17), np.cos(y / 11), np.sin((x + y) / 29)], -1) * 90 + 128
    stripes = ((x // 5 + y // 7) % 2 * 255)[..., None]
    mixed = np.where((x < width // 2)[..., None], smooth + rng.normal(0, 12, smooth.shape), stripes)
    return np.clip(mixed, 0, 255).astype(np.uint8)


def processed(image: np.ndarray, how: pixels.Processing, rounded: bool) -> np.ndarray:
    """Compiled, in 0..255."""
    x = jax.jit(lambda x: pixels.process(x.astype(jnp.float32) / 255, how, rounded))(image)
    return (np.asarray(x, np.float64) * how.std + how.mean) * 255


@pytest.mark.parametrize("size", [(300, 451), (120, 97)])
@pytest.mark.parametrize("name", CASES)
def test_as_the_pil_processor(name, size):
    config, processor = CASES[name]
    how, image = pixels.processing(config), picture(*size)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    expected = (expected * how.std + how.mean) * 255
    found = processed(image, how, rounded=True)
    assert found.shape == expected.shape == (how.size, how.size, 3)
    # PIL's weights have 22 bits: a tie may fall to the other side, by one level.
    assert np.abs(found - expected).max() < 1.01
    assert (np.abs(found - expected) > 0.01).mean() < 1e-3
    smooth = processed(image, how, rounded=False)
    assert np.abs(smooth - expected).max() < 2 and np.abs(smooth - expected).mean() < 0.6


@pytest.mark.parametrize("size", [(300, 451), (120, 97), (1003, 30)])
def test_dinov3_as_torch_resizes(size):
    how, image = pixels.processing(DINOv3Config()), picture(*size)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    expected = (x[0].permute(1, 2, 0).numpy() - how.mean) / how.std
    found = jax.jit(lambda x: pixels.process(x.astype(jnp.float32) / 255, how))(image)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, new_size", [(451, 224), (16, 37), (37, 16), (5, 5), (4000, 224)])
@pytest.mark.parametrize("kernel", ["linear", "cubic", "cubic_sharp"])
def test_matrices_are_torchs(size, new_size, kernel):
    weights = resample.matrix(size, new_size, kernel)
    mode = {"mode": "bilinear" if kernel == "linear" else "bicubic", "antialias": kernel != "cubic_sharp"}
    x = torch.eye(size, dtype=torch.float64)[None, None]
    expected = torch.nn.functional.interpolate(x, (size, new_size), align_corners=False, **mode)[0, 0].numpy().T
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)


def test_part_of_a_matrix_and_a_very_long_picture():
    for kernel in ("linear", "cubic", "cubic_sharp"):
        part = resample.matrix(50, 31, kernel, start=7, count=9)
        np.testing.assert_array_equal(part, resample.matrix(50, 31, kernel)[7:16])
    found = pixels.process(jnp.zeros((2, 20000, 3)), pixels.processing(CLIPConfig()))
    assert found.shape == (224, 224, 3)


def test_compiled_or_not_and_differentiable():
    how = pixels.processing(DINOv2Config())
    x = jnp.asarray(picture(67, 90), jnp.float32)[None, None] / 255
    plain, compiled = pixels.process(x, how), jax.jit(lambda x: pixels.process(x, how))(x)
    assert plain.shape == (1, 1, 224, 224, 3)
    np.testing.assert_allclose(plain, compiled, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: pixels.process(x, how).sum()))(x)
    assert jnp.isfinite(gradient).all() and (gradient != 0).mean() > 0.5
