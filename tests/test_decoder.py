"""The drawing half: shapes, noise levels, guidance in one pass and in two, and what an import refuses."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.test_lora_dit import FLUX, SD3
from uae_jax import config as configs
from uae_jax.convert import __main__ as convert
from uae_jax.errors import UserError
from uae_jax.models import initial
from uae_jax.models.vae.config import Config as VAEConfig
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.models.vae.pieces import tiled
from uae_jax.sampling import flow
from uae_jax.sampling.scheduler import Scheduler
from uae_jax.umm import decoder

VAE = AutoencoderKL(VAEConfig(block_out_channels=(4, 4, 4), norm_num_groups=2, latent_channels=4))


@pytest.mark.parametrize(("config", "channels"), [(SD3, 4), (FLUX, 2)])
def test_shapes_of_latents(config, channels):
    model = decoder.transformer(config)
    assert decoder.latent_shape(model, VAE, 48, 32) == (12, 8, channels)
    assert decoder.latent_shape(model, None, 48, 32) == (48, 32, channels)
    with pytest.raises(UserError, match="52x32 pixels cannot be drawn: both sides must be multiples of 8"):
        decoder.latent_shape(model, VAE, 52, 32)


def test_levels_are_the_schedulers_where_there_is_one():
    settings = configs.default().redraw
    settings.steps, settings.shift = 3, 2.0
    scheduler = Scheduler(use_dynamic_shifting=True, base_image_seq_len=24, max_image_seq_len=96)
    for config in (SD3, FLUX):
        model = decoder.transformer(config)
        plain = decoder.noise_levels(model, None, settings, (12, 8, 4))
        np.testing.assert_array_equal(plain, flow.sigmas(3, 2.0, "uniform"))
        # 24 tokens, for which mu is 0.5
        found = decoder.noise_levels(model, scheduler, settings, (12, 8, 4))
        np.testing.assert_allclose(found, flow.sigmas(3, np.exp(0.5), "uniform"), atol=1e-6)


@pytest.mark.slow
def test_two_passes_give_what_one_of_twice_the_batch_gives():
    model = decoder.transformer(dataclasses.replace(FLUX, num_layers=1, num_single_layers=1), remat="none")
    rng = np.random.default_rng(0)
    x, text, pooled = (rng.standard_normal(s).astype(np.float32) for s in ((1, 2, 4, 4, 2), (2, 1, 2, 3, 6), (5,)))
    mask = np.ones((2, 1, 2, 3), bool)
    params = initial(model, jax.random.key(0), x[0], text[0, 0], np.stack([pooled] * 2), np.ones(2), None, np.ones(2))
    settings = configs.default().redraw
    settings.guidance = 3.0

    def drawn(mask, **changes):
        settings.update(changes)
        frozen = {"transformer": params, "pooled": pooled}
        return decoder.guided_step(model, frozen, x, text, np.float32(0.5), mask, settings)

    one = drawn(mask)
    np.testing.assert_allclose(drawn(mask, two_passes=True), one, rtol=0, atol=1e-5)
    np.testing.assert_allclose(drawn(None), one, rtol=0, atol=1e-5)
    assert np.abs(drawn(mask, distilled_guidance=1.0) - one).max() > 1e-4
    conditional = decoder.draw_step(model, {"transformer": params, "pooled": pooled}, x, text[0], 0.5, mask[0], 1.0)
    other = drawn(mask, guidance=1.0 + 1e-6)
    np.testing.assert_allclose(other, conditional, rtol=0, atol=1e-4)


def test_what_is_no_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="vae is missing"):
        convert.main(["", "import", str(tmp_path), str(tmp_path / "out")])


@pytest.mark.slow
def test_a_large_picture_is_decoded_in_tiles():
    model = AutoencoderKL(
        VAEConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=2)
    )
    params = initial(model, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    latents = np.random.default_rng(0).standard_normal((1, 2, 12, 8, 2)).astype(np.float32)

    def drawn(**pieces):
        return jax.jit(lambda p, z: decoder.pixels_from_latents(z, model, p, **pieces))(params, latents)

    def decode(z):
        return model.apply({"params": params}, z / 1.5305 + 0.0609, method="decode")

    expected = np.clip(tiled(decode, latents, 8, 16) * 0.5 + 0.5, 0, 1)
    assert expected.shape == (1, 2, 24, 16, 3) and np.abs(drawn() - expected).max() > 1e-4
    np.testing.assert_allclose(drawn(tile=16), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(drawn(tile=16, slices=True), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(drawn(tile=24), drawn(), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="multiple of 8"):
        decoder.check_tile(model, 20)
