"""Reading prompts with images, writing after them, and scoring what was written: the half of a family that knows words.

Functions of (model, weights, ...), the weights being all of the model's, adapters included. Axes: b(atch of prompts),
g(roup: answers to one prompt), p(rompt slots), t(okens of an answer), d(model), v(ocab).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from uae_jax import sharding
from uae_jax.models import apply
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.qwen2_5_vl.prompts import Prompt
from uae_jax.sampling import tokens
from uae_jax.sampling.tokens import Sampling, Segment
from uae_jax.umm import Params


def allowed_tokens(tokenizer: Tokenizer, vocab_size: int, *stops: int) -> np.ndarray:
    """bool [v]: what an answer may hold.

    No token that was added to the vocabulary (image placeholders, markup, whether called special or not) but the stops,
    and nothing past the tokenizer's vocabulary.
    """
    allowed = np.zeros(vocab_size, bool)
    allowed[: tokenizer.get_vocab_size()] = True
    allowed[list(tokenizer.get_added_tokens_decoder())] = False
    allowed[list(stops)] = True
    return allowed


def prefill(model: Qwen2_5_VL, weights: Params, prompt: Prompt) -> tuple[jax.Array, Any]:
    """Reads images and prompt once a prompt: the last slot's state [b, d], and a cache of p slots."""
    features = None
    if prompt.patches is not None:
        features = apply(model, weights, prompt.patches, prompt.layout, method="encode_image")
    embeds = apply(model, weights, prompt.tokens, features, method="embed")
    p = prompt.tokens.shape[-1]
    seen = jnp.tril(jnp.ones((p, p), bool)) & prompt.mask[:, None, :]
    positions = jnp.moveaxis(prompt.positions, 1, 0)
    hidden, cache = apply(model, weights, embeds, positions, seen, method="hidden")
    return hidden[:, -1], cache


def grouped(cache: Any, g: int, t: int) -> Any:
    """Repeats each prompt's cache for its group, with room for t tokens: [L, b, p, ...] -> [L, b, g, p + t, ...]."""

    def widen(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, t), (0, 0), (0, 0)])
        return jnp.broadcast_to(x[:, :, None], (*x.shape[:2], g, *x.shape[2:]))

    return jax.tree.map(widen, cache)


def visible(prompt: Prompt, t: int, last: jax.Array) -> jax.Array:
    """bool [b, 1, q, p + t]: the slots that the token in slot `last` [q] sees; b is 1 where all prompts are alike."""
    mask = jnp.pad(prompt.mask, [(0, 0), (0, t)], constant_values=True)
    return mask[:, None, None, :] & (jnp.arange(mask.shape[-1]) <= last[:, None])


def generate(
    model: Qwen2_5_VL,
    weights: Params,
    prompt: Prompt,
    keys: jax.Array,
    *,
    allowed: np.ndarray,
    sampling: Sampling,
    mesh: jax.sharding.Mesh | None = None,
) -> Segment:
    """Draws one answer a key: [b, g, t]. What a row draws depends on its prompt and key alone.

    Args:
      keys: typed PRNG keys [b, g] (`tokens.seeded` makes them of seeds).
    """
    weights = sharding.decode_view(weights, mesh, model.dtype)
    last, cache = prefill(model, weights, prompt)
    p, (b, g), t = prompt.tokens.shape[-1], keys.shape, sampling.max_tokens
    logits = apply(model, weights, last, method="logits")

    def decode(token: jax.Array, i: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        embeds = apply(model, weights, token[..., None], None, method="embed")
        positions = jnp.broadcast_to(prompt.following[:, None, None] + i, (3, b, g, 1))
        seen = visible(prompt, t, (p + i)[None])
        hidden, cache = apply(model, weights, embeds, positions, seen, cache, p + i, method="hidden")
        return apply(model, weights, hidden[..., 0, :], method="logits"), cache

    return tokens.sample(
        jnp.broadcast_to(logits[:, None], (b, g, logits.shape[-1])),
        sharding.constrain_batch(grouped(cache, g, t), mesh, axis=1),
        decode,
        keys,
        allowed=jnp.asarray(allowed),
        sampling=sampling,
    )


def states(model: Qwen2_5_VL, weights: Params, prompt: Prompt, actions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced states: of the last prompt token [b, d], and of the answer's tokens [b, g, t] -> [b, g, t, d]."""
    b, g, t = actions.shape
    last, cache = prefill(model, weights, prompt)
    p = prompt.tokens.shape[-1]
    embeds = apply(model, weights, actions, None, method="embed")
    positions = jnp.broadcast_to(prompt.following[:, None, None] + jnp.arange(t), (3, b, g, t))
    seen = visible(prompt, t, p + jnp.arange(t))
    hidden, _ = apply(model, weights, embeds, positions, seen, grouped(cache, g, t), p, method="hidden")
    return last, hidden


def log_probs(
    model: Qwen2_5_VL,
    weights: Params,
    prompt: Prompt,
    answers: Segment,
    *,
    allowed: np.ndarray,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """Log-probability [b, g, t] of each token of the answers, 0 where it does not count; see `tokens.log_probs`."""
    last, hidden = states(model, weights, prompt, answers.actions)
    first = jnp.broadcast_to(last[:, None, None], (*hidden.shape[:2], 1, hidden.shape[-1]))
    scores = tokens.log_probs(
        jnp.concatenate([first, hidden[..., :-1, :]], axis=-2),
        answers.actions,
        lambda h: apply(model, weights, h, method="logits"),
        allowed=jnp.asarray(allowed),
        temperature=temperature,
        chunk=chunk,
    )
    return jnp.where(answers.mask, scores, 0.0)
