"""UMM-1: a vision-language model writes the caption, a flow-matching MM-DiT draws it (UniWorld-V1, UAE).

    image --Qwen2.5-VL--> caption --Qwen2.5-VL, text alone--> states --projector--> MM-DiT, VAE --> image

The caption is read again, without the image, by a frozen copy of the captioner (`condition_source="text"`,
`text_encoder="frozen"`): text is then the only channel, and the frozen decoder keeps seeing states it knows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import lora, sharding
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.projector.model import Projector
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.prompts import Prompt, alike
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.sampling import flow, tokens
from uae_jax.sampling.scheduler import Scheduler
from uae_jax.sampling.tokens import Segment
from uae_jax.umm import Family, Params, Trajectory, caption, decoder
from uae_jax.umm.prompts import Prompts, captions_as_text, merge

DRAWING = ("projector", "transformer", "vae")  # parts of the frozen weights that `redraw` alone reads


@dataclasses.dataclass(frozen=True)
class Modules:
    """The networks of the loop (linen modules: descriptions without weights)."""

    captioner: Qwen2_5_VL
    projector: Projector
    transformer: decoder.Transformer
    vae: AutoencoderKL | None = None  # None: latents are pixels
    scheduler: Scheduler | None = None  # None: `config.redraw` alone says where the noise levels lie


def text_states(model: Qwen2_5_VL, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Last-layer states [..., t, d] of left-aligned text without any image; padding is never attended to."""
    t = ids.shape[-1]
    positions = jnp.broadcast_to(jnp.arange(t), (3, *ids.shape))
    causal = jnp.tril(jnp.ones((t, t), bool)) & mask[..., None, :]
    embeds = apply(model, params, ids, None, method="embed")
    return apply(model, params, embeds, positions, causal, method="hidden")[0]


def build(
    modules: Modules,
    prompts: Prompts,
    allowed: np.ndarray,
    config: Any,
    mesh: jax.sharding.Mesh | None = None,
    temperature: float | None = None,
) -> Family:
    """The functions of a family for one config.

    `frozen` holds: `start` (all of the captioner's weights before training: the text encoder, the KL reference, and
    whatever is not trained), `projector`, `transformer`, `pooled` [p] (the decoder's constant pooled condition), and
    `vae` where there is one.
    `params["encoder"]` holds the trained leaves of the captioner.

    Args:
      temperature: of `generate`, which then narrows as `config.eval` says; 0 takes the most likely token. None means a
        rollout: the policy itself.

    Raises:
      UserError: the decoder cannot draw images of `config.data.image_size`; or it is to be trained, which samples
        nothing.
    """
    if config.train != "encoder":
        raise UserError(
            f"config.train = {config.train!r}: these weights draw by diffusion, which RL leaves alone; use encoder"
        )
    model, settings, guidance = modules.captioner, config.rl, config.redraw.guidance
    shape = decoder.latent_shape(modules.transformer, modules.vae, config.data.image_size, config.data.image_size)
    decoder.check_tile(modules.vae, config.redraw.tile_vae)
    levels = decoder.noise_levels(modules.transformer, modules.scheduler, config.redraw, shape)
    sampling = tokens.Sampling(settings.max_tokens, (prompts.end_token,), settings.temperature)
    if temperature is not None:
        sampling = sampling._replace(temperature=temperature, top_k=config.eval.top_k, top_p=config.eval.top_p)

    def full(params: Params, frozen: Params) -> Params:
        return merge(frozen["start"], lora.scaled(params["encoder"], config.lora.alpha))

    def seen(images: jax.Array | Prompt) -> Prompt:
        return images if isinstance(images, Prompt) else alike(prompts.caption, images, model.config)

    def generate(params: Params, frozen: Params, images: jax.Array | Prompt, keys: jax.Array) -> Segment:
        return caption.generate(
            model, full(params, frozen), seen(images), keys,
            allowed=allowed, sampling=sampling, mesh=mesh, rules=folder.rules_of(model.config, mesh),
        )  # fmt: skip

    def log_probs(
        params: Params, frozen: Params, images: jax.Array | Prompt, trajectory: Trajectory
    ) -> dict[str, jax.Array]:
        scores = caption.log_probs(
            model,
            full(params, frozen),
            seen(images),
            trajectory["caption"],
            allowed=allowed,
            temperature=settings.temperature,
            chunk=settings.logit_chunk,
        )
        return {"caption": scores}

    def conditions(
        params: Params, frozen: Params, captions: Segment, images: jax.Array | Prompt
    ) -> tuple[jax.Array, jax.Array]:
        """The text encoder's states [b, g, s, d] and their mask."""
        weights = frozen["start"] if config.text_encoder == "frozen" else full(params, frozen)
        length = tokens.content_lengths(captions, prompts.end_token)
        if config.condition_source == "in_context":
            _, states = caption.states(model, weights, seen(images), captions.actions)
            return states, jnp.arange(states.shape[-2]) < length[..., None]
        ids, mask = captions_as_text(
            captions.actions, length, prompts.redraw_prefix, prompts.redraw_suffix, prompts.end_token
        )
        return text_states(model, weights, ids, mask), mask

    def negative_conditions(frozen: Params, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The negative prompt's states, padded to the shape of the positive ones."""
        s = like.shape[-2]
        ids = (prompts.redraw_prefix + prompts.negative + prompts.redraw_suffix)[:s]
        padded = jnp.array(ids + (prompts.end_token,) * (s - len(ids)), jnp.int32)
        mask = jnp.arange(s) < len(ids)
        states = text_states(model, frozen["start"], padded, mask)
        return jnp.broadcast_to(states, like.shape), jnp.broadcast_to(mask, like.shape[:-1])

    def redraw(
        params: Params, frozen: Params, captions: Segment, images: jax.Array | Prompt, keys: jax.Array
    ) -> tuple[jax.Array, Trajectory]:
        frozen = frozen | sharding.fetched({name: frozen[name] for name in DRAWING if name in frozen})
        states, mask = conditions(params, frozen, captions, images)
        # The decoder's weights leave the tensor axis free: it splits the group, where it divides that.
        spread = functools.partial(sharding.constrain_batch, mesh=mesh, group=True, spare=True)
        states, mask, noise = spread((states, mask, decoder.initial_noise(keys, shape, config.redraw.same_noise)))
        if guidance != 1.0:
            # On a new leading axis: conditional, unconditional.
            states, mask = (jnp.stack(x) for x in zip((states, mask), negative_conditions(frozen, states), strict=True))
        text = spread(apply(modules.projector, frozen["projector"], states), axis=0 if guidance == 1.0 else 1)
        shown = mask if config.mask_text else None
        if config.redraw.gather == "once":
            rules = folder.rules_of(modules.transformer.config, mesh)
            view = sharding.decode_view(frozen["transformer"], mesh, modules.transformer.dtype, rules)
            frozen = frozen | {"transformer": view}

        def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
            prediction = decoder.guided_step(modules.transformer, frozen, x, text, sigma, shown, config.redraw)
            return flow.to_velocity(prediction.astype(jnp.float32), x, sigma, config.redraw.prediction)

        latents = flow.euler(velocity, noise, levels)
        pieces = config.redraw.slice_vae, config.redraw.tile_vae
        return decoder.pixels_from_latents(latents, modules.vae, frozen.get("vae"), *pieces, mesh), {}

    return Family(generate, redraw, log_probs)
