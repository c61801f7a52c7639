"""UMM-2: one autoregressive model writes the caption, then draws it as image tokens (Janus-Pro).

    image --SigLIP--> caption --the same language model, text alone--> image tokens --VQ decoder--> image

Caption tokens and image tokens are both actions of one policy: segments `caption` and `image`. The image tokens are
conditioned on the caption's text alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import lora, sharding
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.janus.config import Config
from uae_jax.models.janus.model import Janus
from uae_jax.models.qwen2_5_vl.prompts import Prompt
from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Segment
from uae_jax.umm import Family, Params, Trajectory, caption
from uae_jax.umm.prompts import Prompts, captions_as_text, merge


def about(images: jax.Array, prompts: Prompts, config: Config) -> Prompt:
    """The prompt that asks for a caption, the same for all images [b, H, W, 3] in 0..1."""
    at = prompts.caption.index(config.image_token_id)
    placeholders = (config.image_token_id,) * config.vision.num_patches
    ids = np.array([*prompts.caption[:at], *placeholders, *prompts.caption[at + 1 :]], np.int32)
    return Prompt(
        tokens=ids[None],
        mask=np.ones((1, len(ids)), bool),
        positions=np.arange(len(ids), dtype=np.int32)[None],
        following=np.full(1, len(ids), np.int32),
        patches=images * 2.0 - 1.0,
    )


def drawing(captions: jax.Array, length: jax.Array, prompts: Prompts, pad: int) -> Prompt:
    """The prompts [prefix | caption | suffix] that ask for an image, right-aligned: one cache index serves all rows.

    Args:
      captions: int [..., t].
      length: [...], how many of those tokens to keep (without the end token).
    """
    ids, mask = captions_as_text(captions, length, prompts.redraw_prefix, prompts.redraw_suffix, pad)
    p, count = ids.shape[-1], mask.sum(-1, dtype=jnp.int32)
    positions = jnp.arange(p) - (p - count[..., None])
    aligned = jnp.take_along_axis(ids, positions % p, axis=-1)
    return Prompt(aligned, positions >= 0, jnp.maximum(positions, 0), count)


def unconditional(prompt: Prompt, pad: int) -> Prompt:
    """The unconditional branch of `drawing`: all tokens but the first and the last are padding, and attended to."""
    inside = (prompt.positions > 0) & (jnp.arange(prompt.tokens.shape[-1]) < prompt.tokens.shape[-1] - 1)
    return prompt._replace(tokens=jnp.where(inside, pad, prompt.tokens))


def build(
    model: Janus,
    prompts: Prompts,
    allowed: np.ndarray,
    config: Any,
    mesh: jax.sharding.Mesh | None = None,
    temperature: float | None = None,
) -> Family:
    """The functions of a family for one config.

    `frozen["start"]` holds all of the model's weights before training: the KL reference, whatever is not trained, and,
    with a frozen `config.text_encoder`, what draws. `params["encoder"]` holds the trained leaves of the one model.

    Args:
      allowed: bool [v], what a caption may hold.
      temperature: of `generate`, which then narrows as `config.eval` says; 0 takes the most likely token. None means a
        rollout: the policy itself. Image tokens are drawn at `config.redraw.temperature` always.

    Raises:
      UserError: images of another size than the model's; a prompt that does not ask for an image; or image tokens are
        learnt from, but not drawn by the policy in training, each for itself.
    """
    c, settings, drawn = model.config, config.rl, config.redraw
    if config.data.image_size != c.vision.image_size:
        raise UserError(
            f"config.data.image_size = {config.data.image_size}: this model reads and draws images of "
            f"{c.vision.image_size} pixels only"
        )
    if prompts.redraw_suffix[-1:] != (c.boi_token_id,):
        raise UserError(
            f"config.prompt.redraw_suffix = {config.prompt.redraw_suffix!r}: it must end with the tag that begins an "
            f"image (token {c.boi_token_id})"
        )
    if config.condition_source != "text":
        raise UserError("config.condition_source = 'in_context': this model draws from the caption alone; use text")
    live = config.text_encoder == "live"
    if config.train != "encoder" and not (live and drawn.temperature and not drawn.same_noise):
        raise UserError(
            f"config.train = {config.train!r}: image tokens that are learnt from are drawn by the weights in training, "
            "each at random: set text_encoder=live, redraw.same_noise=False and redraw.temperature above 0"
        )
    words = tokens.Sampling(settings.max_tokens, (prompts.end_token,), settings.temperature)
    if temperature is not None:
        words = words._replace(temperature=temperature, top_k=config.eval.top_k, top_p=config.eval.top_p)
    codes = tokens.Sampling(c.vq.num_patches**2, (), drawn.temperature)
    rules = folder.rules_of(c, mesh)
    every_code = np.ones(c.vq.num_embeddings, bool)

    def full(params: Params, frozen: Params) -> Params:
        return merge(frozen["start"], lora.scaled(params["encoder"], config.lora.alpha))

    def generate(params: Params, frozen: Params, images: jax.Array, keys: jax.Array) -> Segment:
        prompt = about(images, prompts, c)
        return caption.generate(
            model, full(params, frozen), prompt, keys, allowed=allowed, sampling=words, mesh=mesh, rules=rules
        )

    def asking(captions: Segment) -> Prompt:
        """Prompts [b, g]; [2, b, g], conditional and unconditional, where there is guidance."""
        length = tokens.content_lengths(captions, prompts.end_token)
        prompt = drawing(captions.actions, length, prompts, c.pad_token_id)
        if drawn.guidance == 1.0:
            return prompt
        other = unconditional(prompt, c.pad_token_id)
        return jax.tree.map(lambda *branches: jnp.stack(branches), prompt, other)

    def redraw(
        params: Params, frozen: Params, captions: Segment, _images: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, Trajectory]:
        weights = full(params, frozen) if live else frozen["start"]
        if drawn.same_noise:
            keys = jnp.broadcast_to(keys[:, :1], keys.shape)
        # Every caption is a prompt of its own, with one answer.
        answers = caption.generate(
            model, weights, asking(captions), keys[..., None],
            allowed=every_code, sampling=codes, mesh=mesh, rules=rules, kind=caption.CODES, guidance=drawn.guidance,
        )  # fmt: skip
        segment = jax.tree.map(lambda x: x[..., 0, :], answers)
        # Convolutions with split kernels, or codes of unknown layout, and the whole batch is drawn on every device.
        painter = weights | sharding.decode_view({"vq": weights["vq"]}, mesh, model.dtype, rules)

        def pixels(codes: jax.Array) -> jax.Array:
            return apply(model, painter, codes, method="decode_codes")

        return sharding.each_sample(pixels, segment.actions, mesh, drawn.slice_vae), {"image": segment}

    def log_probs(params: Params, frozen: Params, images: jax.Array, trajectory: Trajectory) -> dict[str, jax.Array]:
        weights, captions = full(params, frozen), trajectory["caption"]
        scores = {
            "caption": caption.log_probs(
                model, weights, about(images, prompts, c), captions,
                allowed=allowed, temperature=settings.temperature, chunk=settings.logit_chunk,
            )
        }  # fmt: skip
        if "image" in trajectory:
            segment = jax.tree.map(lambda x: x[..., None, :], trajectory["image"])
            scores["image"] = caption.log_probs(
                model, weights, asking(captions), segment, allowed=every_code,
                temperature=drawn.temperature or 1.0, chunk=settings.logit_chunk,
                kind=caption.CODES, guidance=drawn.guidance,
            )[..., 0, :]  # fmt: skip
        return scores

    return Family(generate, redraw, log_probs)
