"""Text -> image by a decoder's own text towers, as diffusers' pipelines of SD3 and FLUX run it: the baseline of UMM-1.

SD3 reads the states of both CLIP towers, side by side and padded with zeros to T5's width, then those of T5, and both
pooled vectors; guidance is against the empty prompt. FLUX reads T5's states and CLIP-L's pooled vector; its guidance is
distilled into the weights. Padding is seen by every tower and by the MM-DiT.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models import apply
from uae_jax.models.clip.model import CLIPText
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux.model import FluxTransformer
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.t5.model import T5Encoder
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.sampling import flow
from uae_jax.sampling.scheduler import Scheduler
from uae_jax.umm import Params, decoder

# Folders of a pipeline's T5 and of its tokenizer, and how many tokens the pipeline hands it.
T5 = {
    sd3_config.CLASS_NAME: ("text_encoder_3", "tokenizer_3", 256),
    flux_config.CLASS_NAME: ("text_encoder_2", "tokenizer_2", 512),
}

Tokens = dict[str, jax.Array]  # ids int [..., t] by the folder of the tower that reads them


@dataclasses.dataclass(frozen=True)
class Host:
    """The networks of a pipeline (linen modules: descriptions without weights).

    Attributes:
      clips: (folder, tower), in the order of their vectors.
      t5: None where an SD3 comes without it: its states are then zeros.
    """

    clips: tuple[tuple[str, CLIPText], ...]
    t5: T5Encoder | None
    transformer: decoder.Transformer
    vae: AutoencoderKL
    scheduler: Scheduler

    @property
    def flux(self) -> bool:
        """FLUX, not SD3."""
        return isinstance(self.transformer, FluxTransformer)

    @property
    def kind(self) -> str:
        """The transformer's class in diffusers."""
        return flux_config.CLASS_NAME if self.flux else sd3_config.CLASS_NAME


def conditions(host: Host, params: Params, ids: Tokens) -> tuple[jax.Array, jax.Array]:
    """What the MM-DiT reads of prompts: text [..., s, joint_attention_dim] and pooled [..., pooled_projection_dim].

    Args:
      params: by folder.
      ids: of every tower, padded to its length.
    """
    hidden, vectors = zip(*(apply(tower, params[name], ids[name]) for name, tower in host.clips), strict=True)
    pooled = jnp.concatenate(vectors, axis=-1)
    name, _, length = T5[host.kind]
    width = host.transformer.config.joint_attention_dim
    if host.t5 is None:
        states = jnp.zeros((*pooled.shape[:-1], length, width), pooled.dtype)
    else:
        states = apply(host.t5, params[name], ids[name])
    if host.flux:
        return states, pooled
    clip = jnp.concatenate(hidden, axis=-1)
    clip = jnp.pad(clip, [(0, 0)] * (clip.ndim - 1) + [(0, width - clip.shape[-1])])
    return jnp.concatenate([clip, states], axis=-2), pooled


def noise_levels(host: Host, steps: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise levels [steps + 1] for latents of (h, w, c), spaced as the pipeline spaces them."""
    tokens = shape[0] * shape[1] // decoder.patch(host.transformer) ** 2
    return host.scheduler.sigmas(steps, "uniform" if host.flux else "diffusers", tokens)


def latents(host: Host, params: Params, ids: Tokens, negative: Tokens, noise: jax.Array, settings: Any) -> jax.Array:
    """Latents [b, g, h, w, c], g of each prompt.

    Args:
      ids: of the prompts, [b, t].
      negative: of the prompt of guidance's other branch, [t]; the pipelines' is empty. FLUX has none.
      noise: [b, g, h, w, c] float32.
      settings: `config.redraw`: steps, guidance, distilled_guidance, two_passes.
    """
    text, pooled = conditions(host, params, ids)
    guided = settings.guidance != 1.0 and not host.flux
    if guided:
        # On a new leading axis: conditional, unconditional.
        pairs = zip((text, pooled), conditions(host, params, negative), strict=True)
        text, pooled = (jnp.stack([x, jnp.broadcast_to(y, x.shape)]) for x, y in pairs)
    g = noise.shape[1]
    text = jnp.repeat(text[..., None, :, :], g, axis=-3)
    frozen = {"transformer": params["transformer"], "pooled": jnp.repeat(pooled[..., None, :], g, axis=-2)}

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        if guided:
            return decoder.guided_step(host.transformer, frozen, x, text, sigma, None, settings).astype(jnp.float32)
        return decoder.draw_step(host.transformer, frozen, x, text, sigma, None, settings.distilled_guidance)

    return flow.euler(velocity, noise, noise_levels(host, settings.steps, noise.shape[2:]))
