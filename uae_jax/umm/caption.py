"""Reading prompts, writing after them, and scoring what was written: words, or an image as a sequence of codes.

Functions of (model, weights, ...), the weights being all of the model's, adapters included. Axes: `...` those of the
prompts, g(roup: answers to one prompt), p(rompt slots), t(okens of an answer), d(model), v(ocab).

With classifier-free guidance prompts have a leading axis of 2 that answers have not, conditional and unconditional; one
distribution, of the combined logits, is sampled from and scored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from uae_jax import sharding
from uae_jax.models import apply
from uae_jax.models.qwen2_5_vl.prompts import Prompt
from uae_jax.sampling import flow, tokens
from uae_jax.sampling.tokens import Sampling, Segment
from uae_jax.umm import Params


class Kind(NamedTuple):
    """What is written, as two methods of the model."""

    embed: str  # int [..., t] -> [..., t, d]
    logits: str  # [..., d] -> float32 [..., v]


WORDS = Kind("embed", "logits")
CODES = Kind("embed_codes", "code_logits")


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


def prefill(model: nn.Module, weights: Params, prompt: Prompt) -> tuple[jax.Array, Any]:
    """Reads images and prompt once a prompt: the last slot's state [..., d], and a cache of p slots."""
    features = None
    if prompt.patches is not None:
        pictures = (prompt.patches,) if prompt.layout is None else (prompt.patches, prompt.layout)
        features = apply(model, weights, *pictures, method="encode_image")
    embeds = apply(model, weights, prompt.tokens, features, method="embed")
    p = prompt.tokens.shape[-1]
    seen = jnp.tril(jnp.ones((p, p), bool)) & prompt.mask[..., None, :]
    positions = prompt.positions
    if positions.ndim > prompt.tokens.ndim:  # several axes of positions
        positions = jnp.moveaxis(positions, -2, 0)
    hidden, cache = apply(model, weights, embeds, positions, seen, method="hidden")
    return hidden[..., -1, :], cache


def grouped(cache: Any, g: int, t: int) -> Any:
    """Repeats each prompt's cache for its group, with room for t tokens.

    [L, ..., p, kv, h] -> [L, ..., g, p + t, kv, h].
    """

    def widen(x: jax.Array) -> jax.Array:
        *batch, p, kv, h = x.shape
        x = jnp.pad(x, [*[(0, 0)] * len(batch), (0, t), (0, 0), (0, 0)])
        return jnp.broadcast_to(x[..., None, :, :, :], (*batch, g, p + t, kv, h))

    return jax.tree.map(widen, cache)


def visible(prompt: Prompt, t: int, last: jax.Array) -> jax.Array:
    """bool [..., 1, q, p + t]: the slots that the token in slot `last` [q] sees."""
    mask = jnp.pad(prompt.mask, [*[(0, 0)] * (prompt.mask.ndim - 1), (0, t)], constant_values=True)
    return mask[..., None, None, :] & (jnp.arange(mask.shape[-1]) <= last[:, None])


def following(model: nn.Module, prompt: Prompt, batch: tuple[int, ...], at: jax.Array) -> jax.Array:
    """Positions, as the model's `hidden` takes them, of the answers' tokens number `at` [q], for rows [*batch]."""
    positions = jnp.asarray(prompt.following)[..., None, None] + at
    return model.text_positions(jnp.broadcast_to(positions, (*batch, *at.shape)))


def combined(logits: jax.Array, guidance: float, axis: int = 0) -> jax.Array:
    """Logits [..., v] of the two branches of guidance along `axis`; for guidance 1, which has one, as they are."""
    if guidance == 1.0:
        return logits
    conditional, unconditional = jnp.moveaxis(logits, axis, 0)
    return flow.guided(conditional, unconditional, guidance)


def generate(
    model: nn.Module,
    weights: Params,
    prompt: Prompt,
    keys: jax.Array,
    *,
    allowed: np.ndarray,
    sampling: Sampling,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = (),
    kind: Kind = WORDS,
    guidance: float = 1.0,
) -> Segment:
    """Draws one answer a key: [..., g, t]. What a row draws depends on its prompt and key alone.

    Args:
      keys: typed PRNG keys [..., g] (`tokens.seeded` makes them of seeds).
      rules: of the model's parameters, for a mesh.
    """
    weights = sharding.decode_view(weights, mesh, model.dtype, rules)
    last, cache = prefill(model, weights, prompt)
    p, g, t = prompt.tokens.shape[-1], keys.shape[-1], sampling.max_tokens
    batch = (*last.shape[:-1], g)
    logits = apply(model, weights, last, method=kind.logits)

    def decode(token: jax.Array, i: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        embeds = apply(model, weights, token[..., None], method=kind.embed)
        embeds = jnp.broadcast_to(embeds, (*batch, *embeds.shape[-2:]))
        seen = visible(prompt, t, (p + i)[None])
        hidden, cache = apply(
            model, weights, embeds, following(model, prompt, batch, i[None]), seen, cache, p + i, method="hidden"
        )
        return combined(apply(model, weights, hidden[..., 0, :], method=kind.logits), guidance), cache

    answers = tokens.sample(
        combined(jnp.broadcast_to(logits[..., None, :], (*batch, logits.shape[-1])), guidance),
        sharding.constrain_batch(grouped(cache, g, t), mesh, axis=1 if guidance == 1.0 else 2, group=True),
        decode,
        keys,
        allowed=jnp.asarray(allowed),
        sampling=sampling,
    )
    # Else the layout in which answers are drawn goes back into the loop, whose layers want another.
    return sharding.constrain_batch(answers, mesh, group=True)


def states(
    model: nn.Module, weights: Params, prompt: Prompt, actions: jax.Array, kind: Kind = WORDS
) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced states: of the last prompt token [..., d], and of the answer's, [..., g, t] -> [..., g, t, d]."""
    g, t = actions.shape[-2:]
    last, cache = prefill(model, weights, prompt)
    p, batch = prompt.tokens.shape[-1], (*last.shape[:-1], g)
    embeds = apply(model, weights, actions, method=kind.embed)
    embeds = jnp.broadcast_to(embeds, (*batch, *embeds.shape[-2:]))
    positions = following(model, prompt, batch, jnp.arange(t))
    seen = visible(prompt, t, p + jnp.arange(t))
    hidden, _ = apply(model, weights, embeds, positions, seen, grouped(cache, g, t), p, method="hidden")
    return last, hidden


def log_probs(
    model: nn.Module,
    weights: Params,
    prompt: Prompt,
    answers: Segment,
    *,
    allowed: np.ndarray,
    temperature: float,
    chunk: int,
    kind: Kind = WORDS,
    guidance: float = 1.0,
) -> jax.Array:
    """Log-probability [..., g, t] of each token of the answers, 0 where it does not count; see `tokens.log_probs`."""
    last, hidden = states(model, weights, prompt, answers.actions, kind)
    first = jnp.broadcast_to(last[..., None, None, :], (*hidden.shape[:-2], 1, hidden.shape[-1]))
    # The state before a token predicts it.
    before = jnp.concatenate([first, hidden[..., :-1, :]], axis=-2)
    if guidance != 1.0:
        before = jnp.moveaxis(before, 0, -2)  # [..., g, t, 2, d]
    scores = tokens.log_probs(
        before,
        answers.actions,
        lambda h: combined(apply(model, weights, h, method=kind.logits), guidance, axis=-2),
        allowed=jnp.asarray(allowed),
        temperature=temperature,
        chunk=chunk,
    )
    return jnp.where(answers.mask, scores, 0.0)
