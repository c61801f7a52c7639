"""The VAE against diffusers' AutoencoderKL."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.parity.conftest import redraw, tensors
from uae_jax import sharding
from uae_jax.convert.table import load, save
from uae_jax.errors import UserError
from uae_jax.models.vae.config import Config
from uae_jax.models.vae.model import AutoencoderKL, GroupNorm, gaussian
from uae_jax.models.vae.pieces import tiled
from uae_jax.models.vae.weights import table

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

TINY = Config(
    in_channels=3,
    out_channels=4,
    block_out_channels=(8, 16, 16),
    layers_per_block=2,
    latent_channels=5,
    norm_num_groups=4,
    scaling_factor=0.3611,
    shift_factor=0.1159,
)


def to_torch(x: np.ndarray):
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny():
    """The reference with every parameter re-drawn, and ours with its weights."""
    reference = diffusers.AutoencoderKL.from_config(TINY.to_hf()).eval()
    redraw(reference)
    return reference, AutoencoderKL(TINY), {"params": load(table(TINY), tensors(reference))}


def test_encode(tiny):
    reference, model, variables = tiny
    images = 0.5 * draw(2, 24, 16, 3)
    with torch.no_grad():
        posterior = reference.encode(to_torch(images)).latent_dist
    mean, logvar = jax.jit(lambda v, x: model.apply(v, x, method="encode"))(variables, images)
    assert mean.shape == logvar.shape == (2, 6, 4, 5)
    assert posterior.mean.abs().max() > 1
    np.testing.assert_allclose(mean, posterior.mean.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(logvar, posterior.logvar.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


def test_log_variance_is_clipped(tiny):
    _, model, variables = tiny
    images = draw(1, 16, 16, 3)
    raw = model.apply(variables, images, method=lambda m, x: m.encoder(x))
    grown = jax.tree_util.tree_map_with_path(
        lambda path, x: 50 * x if "conv_out" in jax.tree_util.keystr(path) and "encoder" in str(path[1]) else x,
        variables,
    )
    _, logvar = model.apply(grown, images, method="encode")
    assert logvar.min() == -30 and logvar.max() == 20
    np.testing.assert_allclose(logvar, np.clip(50 * raw[..., 5:], -30, 20), rtol=0, atol=1e-3)


def test_decode(tiny):
    reference, model, variables = tiny
    latents = draw(2, 5, 3, 5)
    with torch.no_grad():
        expected = reference.decode(to_torch(latents)).sample.permute(0, 2, 3, 1).numpy()
    images = jax.jit(lambda v, x: model.apply(v, x, method="decode"))(variables, latents)
    assert images.shape == expected.shape == (2, 20, 12, 4)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def test_group_norm_of_small_and_shifted_activations(tiny):
    """Its epsilon, and a mean that is large against the deviation."""
    reference, _, variables = tiny
    x = draw(2, 6, 5, 8) * np.array([1e-3, 1e-2], np.float32)[:, None, None, None]
    x[1] += 3
    with torch.no_grad():
        expected = reference.decoder.conv_norm_out(to_torch(x)).permute(0, 2, 3, 1).numpy()
    params = {"params": variables["params"]["decoder"]["conv_norm_out"]}
    found = GroupNorm(TINY.norm_num_groups, np.float32).apply(params, x)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-4)


def test_gradient_of_a_decoded_image(tiny):
    """The gradient of pixels in latents, which a trained decoder follows."""
    reference, model, variables = tiny
    latents, cotangent = draw(1, 4, 4, 5), draw(1, 16, 16, 4) / 32
    x = to_torch(latents).requires_grad_()
    (reference.decode(x).sample * to_torch(cotangent)).sum().backward()
    found = jax.jit(jax.grad(lambda z: (model.apply(variables, z, method="decode") * cotangent).sum()))(latents)
    np.testing.assert_allclose(found, x.grad.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


def test_leading_axes_are_free(tiny):
    _, model, variables = tiny
    # Images of a group differ in scale: a norm over two of them would show.
    images = draw(2, 3, 16, 8, 3) * np.array([0.1, 1, 3], np.float32)[:, None, None, None]
    apply = jax.jit(model.apply)
    grouped, flat = apply(variables, images), apply(variables, images.reshape(6, 16, 8, 3))
    assert grouped.shape == (2, 3, 16, 8, 4)
    np.testing.assert_allclose(grouped.reshape(flat.shape), flat, rtol=0, atol=1e-5)
    alone = apply(variables, images[1:2, 2])
    np.testing.assert_allclose(grouped[1:2, 2], alone, rtol=0, atol=1e-5)


def test_round_trip_is_bit_identical_and_fits_init(tiny):
    reference, model, variables = tiny
    saved, expected = save(table(TINY), variables["params"]), tensors(reference)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and np.array_equal(saved[name], value), name
    fresh = jax.eval_shape(model.init, jax.random.key(0), draw(1, 16, 16, 3))
    assert jax.tree.map(lambda x: x.shape, fresh["params"]) == jax.tree.map(np.shape, variables["params"])


def test_config():
    hf = TINY.to_hf()
    assert Config.from_hf(hf) == TINY
    assert Config.from_hf(dict(diffusers.AutoencoderKL.from_config(hf).config)) == TINY
    with pytest.raises(UserError, match="AutoencoderDC"):
        Config.from_hf({**hf, "_class_name": "AutoencoderDC"})
    with pytest.raises(UserError, match=r"missing fields \['latent_channels'\]"):
        Config.from_hf({k: v for k, v in hf.items() if k != "latent_channels"})
    with pytest.raises(UserError, match="use_quant_conv=True"):
        Config.from_hf({k: v for k, v in hf.items() if k != "use_quant_conv"})
    with pytest.raises(UserError, match="AttnDownEncoderBlock2D"):
        Config.from_hf({**hf, "down_block_types": ["AttnDownEncoderBlock2D"] * 3})
    with pytest.raises(UserError, match="not supported: depth=3"):
        Config.from_hf({**hf, "depth": 3})
    with pytest.raises(UserError, match="8 does not divide into 3 groups"):
        Config.from_hf({**hf, "norm_num_groups": 3})


def test_parts_are_the_whole(tiny):
    _, model, variables = tiny
    latents = draw(2, 3, 4, 3, 5)
    decode = jax.jit(lambda z: model.apply(variables, z, method="decode"))
    expected = decode(latents)
    for parts, axis in ((2, 0), (3, 1), (1, 1)):
        found = sharding.in_parts(decode, latents, parts, axis)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_tiles():
    """Three rows and two columns of tiles, the last of them smaller; and an image of a single tile, left whole."""
    config = dataclasses.replace(TINY, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    reference = diffusers.AutoencoderKL.from_config(config.to_hf()).eval()
    redraw(reference)
    model, variables = AutoencoderKL(config), {"params": load(table(config), tensors(reference))}
    decode = jax.jit(lambda z: model.apply(variables, z, method="decode"))
    moments = jax.jit(lambda x: model.apply(variables, x, method="moments"))
    reference.enable_tiling()
    reference.tile_latent_min_size, reference.tile_sample_min_size = 8, 16
    for height, width in ((14, 10), (2, 8)):
        latents, images = draw(2, height, width, 5), 0.5 * draw(2, 2 * height, 2 * width, 3)
        with torch.no_grad():
            decoded = reference.decode(to_torch(latents)).sample.permute(0, 2, 3, 1).numpy()
            posterior = reference.encode(to_torch(images)).latent_dist
            whole = reference.decoder(to_torch(latents)).permute(0, 2, 3, 1).numpy()
        assert (np.abs(decoded - whole).max() < 1e-4) == (height == 2)
        found = tiled(decode, latents, 8, 16)
        assert found.shape == decoded.shape
        np.testing.assert_allclose(found, decoded, rtol=0, atol=1e-4)
        mean, logvar = gaussian(tiled(moments, images, 16, 8))
        np.testing.assert_allclose(mean, posterior.mean.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)
        np.testing.assert_allclose(logvar, posterior.logvar.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4)


def test_tiles_overlap_by_whole_pixels():
    with pytest.raises(ValueError, match="10 -> 80"):
        tiled(lambda x: x, np.zeros((16, 16, 1)), 10, 80)
