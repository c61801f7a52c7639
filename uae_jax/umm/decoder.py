"""The drawing half of UMM-1: an MM-DiT of SD3's or FLUX's kind, its noise levels, and the VAE behind its latents."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import sharding
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux.model import FluxTransformer
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.sd3.model import SD3Transformer
from uae_jax.models.vae.model import AutoencoderKL, gaussian
from uae_jax.models.vae.pieces import OVERLAP, tiled
from uae_jax.sampling import flow, tokens
from uae_jax.sampling.scheduler import Scheduler
from uae_jax.umm import Params

Transformer = SD3Transformer | FluxTransformer
KINDS = (sd3_config.CLASS_NAME, flux_config.CLASS_NAME)


def transformer(config: Any, dtype: Any = jnp.float32, remat: str = "full") -> Transformer:
    """The MM-DiT of a config of one of `KINDS`."""
    if isinstance(config, flux_config.Config):
        return FluxTransformer(config, dtype, remat)
    return SD3Transformer(config, dtype, remat)


def patch(model: Transformer) -> int:
    """Side of what becomes one token, in latent pixels."""
    return flux_config.PACK if isinstance(model, FluxTransformer) else model.config.patch_size


def channels(model: Transformer) -> int:
    """Channels of the latents that an MM-DiT reads and draws."""
    return model.config.in_channels // (flux_config.PACK**2 if isinstance(model, FluxTransformer) else 1)


def latent_shape(model: Transformer, vae: AutoencoderKL | None, height: int, width: int) -> tuple[int, int, int]:
    """Shape (h, w, c) of the latents of images of height x width pixels.

    Raises:
      UserError: the sides do not divide into patches of whole latents.
    """
    factor = 1 if vae is None else vae.config.downsampling
    side = factor * patch(model)
    if height % side or width % side:
        raise UserError(
            f"images of {height}x{width} pixels cannot be drawn: both sides must be multiples of {side} (patches of "
            f"{patch(model)} times the VAE's factor of {factor}); change config.data.image_size"
        )
    return height // factor, width // factor, channels(model)


def noise_levels(
    model: Transformer, scheduler: Scheduler | None, settings: Any, shape: tuple[int, int, int]
) -> np.ndarray:
    """Noise levels [steps + 1] for latents of (h, w, c); `settings` is `config.redraw`, whose shift counts only where
    the weights come without a scheduler."""
    if scheduler is None:
        return flow.sigmas(settings.steps, settings.shift, settings.spacing)
    return scheduler.sigmas(settings.steps, settings.spacing, math.prod(shape[:2]) // patch(model) ** 2)


def initial_noise(keys: jax.Array, shape: tuple[int, ...], same: bool) -> jax.Array:
    """Gaussian noise [b, g, *shape], by row; `same` repeats that of each group's first sample."""
    drawn = tokens.map_keys(lambda k: jax.random.normal(k, shape), keys[:, :1] if same else keys)
    return jnp.broadcast_to(drawn, (*keys.shape, *shape))


def draw_step(
    model: Transformer,
    frozen: Params,
    latents: jax.Array,
    text: jax.Array,
    sigma: jax.Array,
    mask: jax.Array | None,
    distilled_guidance: float = 1.0,
) -> jax.Array:
    """One call of the MM-DiT: latents [..., h, w, c], text [..., s, d], mask bool [..., s] -> like latents.

    Args:
      frozen: `transformer` and `pooled` [p], the constant pooled condition (or [..., p], one a sample).
      sigma: noise level 0..1, a scalar or [...], which the model knows as a timestep 0..1000.
      distilled_guidance: scale that a FLUX with guidance_embeds is told; no other model reads it.
    """
    batch = latents.shape[:-3]
    pooled = jnp.broadcast_to(frozen["pooled"], (*batch, frozen["pooled"].shape[-1]))
    timestep = jnp.broadcast_to(sigma * flow.TRAIN_TIMESTEPS, batch)
    inputs = [latents, text, pooled, timestep, mask]
    if isinstance(model, FluxTransformer) and model.config.guidance_embeds:
        inputs.append(jnp.full(batch, distilled_guidance, jnp.float32))
    return apply(model, frozen["transformer"], *inputs)


def guided_step(
    model: Transformer,
    frozen: Params,
    x: jax.Array,
    text: jax.Array,
    sigma: jax.Array,
    mask: jax.Array | None,
    settings: Any,
) -> jax.Array:
    """`draw_step` with classifier-free guidance as `config.redraw` says.

    Args:
      x: latents [..., h, w, c].
      text: [2, ..., s, d], conditional and unconditional; [..., s, d] where guidance is 1, which skips the second.
      mask: likewise.
    """
    distilled = settings.distilled_guidance
    if settings.guidance == 1.0:
        return draw_step(model, frozen, x, text, sigma, mask, distilled)
    if settings.two_passes:
        pooled = jnp.broadcast_to(frozen["pooled"], (*text.shape[:-2], frozen["pooled"].shape[-1]))
        both = jax.lax.map(
            lambda branch: draw_step(model, frozen | {"pooled": branch[2]}, x, branch[0], sigma, branch[1], distilled),
            (text, mask, pooled),
        )
    else:
        both = draw_step(model, frozen, jnp.broadcast_to(x, (2, *x.shape)), text, sigma, mask, distilled)
    return flow.guided(both[0], both[1], settings.guidance)


def check_tile(vae: AutoencoderKL | None, side: int) -> None:
    """Raises UserError where tiles of `config.redraw.tile_vae` pixels do not overlap by whole latents."""
    step = int(1 / OVERLAP) * (1 if vae is None else vae.config.downsampling)
    if side % step:
        raise UserError(f"config.redraw.tile_vae = {side}: the side of a tile must be a multiple of {step} pixels")


def pixels_from_latents(
    latents: jax.Array,
    vae: AutoencoderKL | None = None,
    params: Params = None,
    slices: bool = False,
    tile: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
    """Images [b, g, H, W, 3] in 0..1 of latents [b, g, h, w, c]; without a VAE, latents are pixels in -1..1.

    Args:
      slices: decode one sample of each group (a device) at a time.
      tile: ... and larger images in tiles of so many pixels a side (`pieces.tiled`); 0: as a whole.
    """
    if vae is not None:
        # Convolutions whose kernels are split would draw the whole batch on every device.
        params = sharding.decode_view(params, mesh, vae.dtype, folder.rules_of(vae.config, mesh))

        def whole(z: jax.Array) -> jax.Array:
            z = z / vae.config.scaling_factor + vae.config.shift_factor
            return apply(vae, params, z, method="decode").astype(jnp.float32)

        def decode(z: jax.Array) -> jax.Array:
            return tiled(whole, z, tile // vae.config.downsampling, tile) if tile else whole(z)

        latents = sharding.each_sample(decode, latents, mesh, slices)
    return jnp.clip(latents * 0.5 + 0.5, 0.0, 1.0)


def latents_from_pixels(
    images: jax.Array, vae: AutoencoderKL | None = None, params: Params = None, key: jax.Array | None = None
) -> jax.Array:
    """What the MM-DiT learns to draw of images [..., H, W, 3] in 0..1; the inverse of `pixels_from_latents`.

    Args:
      key: samples the VAE's Gaussian; None takes its mean.
    """
    if vae is None:
        return images * 2.0 - 1.0
    return latents_from_moments(moments_from_pixels(images, vae, params), vae, key)


def moments_from_pixels(images: jax.Array, vae: AutoencoderKL, params: Params) -> jax.Array:
    """The VAE's Gaussians [..., h, w, 2 c] of images [..., H, W, 3] in 0..1, in its compute type."""
    return apply(vae, params, images * 2.0 - 1.0, method="moments")


def latents_from_moments(moments: jax.Array, vae: AutoencoderKL, key: jax.Array | None = None) -> jax.Array:
    """Latents float32 [..., h, w, c] of `moments_from_pixels`; `key` as in `latents_from_pixels`."""
    latents, logvar = gaussian(moments.astype(jnp.float32))
    if key is not None:
        latents = latents + jnp.exp(0.5 * logvar) * jax.random.normal(key, latents.shape)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor
