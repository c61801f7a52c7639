"""Sampling tokens in a `while_loop` and scoring them again: one masked, tempered distribution serves both.

Axes: `...` is [b] or [b, g]; t(okens), v(ocab), d(model). A token that is not `allowed` (image placeholders, padding,
chat markup) is never sampled and takes no share of the probability in the scorer either, so that both see one policy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uae_jax.sharding import batch_kept

Cache = Any


class Sampling(NamedTuple):
    """How tokens are drawn. `top_k` and `top_p` are for people: what they cut off no policy gradient knows of.

    As in transformers: the temperature acts first, then `top_k`, then `top_p` on what that has left.
    """

    max_tokens: int
    stops: tuple[int, ...]  # a token of these ends the sequence, and is its last
    temperature: float = 1.0  # 0 takes the most likely token; log-probabilities are then those at temperature 1
    top_k: int = 0  # draw among the k most likely tokens only; 0: all
    top_p: float = 1.0  # draw among the fewest tokens whose probabilities reach p; 1: all


class Segment(NamedTuple):
    """What a policy did: actions, which of them count, and the log-probability each was drawn with."""

    actions: jax.Array  # int32 [..., t]; 0 where not counted
    mask: jax.Array  # bool [..., t]; the first `length` entries, the end token included
    log_probs: jax.Array  # float32 [..., t]; 0 where not counted


def tempered(logits: jax.Array, allowed: jax.Array, temperature: float) -> jax.Array:
    """Log-probabilities [..., v] of softmax(logits / temperature) over the allowed tokens, -inf elsewhere."""
    logits = logits.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)


def narrowed(log_probs: jax.Array, sampling: Sampling) -> jax.Array:
    """Log-probabilities [..., v] with -inf for what `top_k` and `top_p` leave out; ties of the last one in stay."""
    if sampling.top_k:
        least = jax.lax.top_k(log_probs, min(sampling.top_k, log_probs.shape[-1]))[0][..., -1:]
        log_probs = jnp.where(log_probs < least, -jnp.inf, log_probs)
    if sampling.top_p < 1.0:
        ordered = -jnp.sort(-log_probs, axis=-1)
        mass = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        count = (before < sampling.top_p).sum(-1, keepdims=True)
        least = jnp.take_along_axis(ordered, count - 1, axis=-1)
        log_probs = jnp.where(log_probs < least, -jnp.inf, log_probs)
    return log_probs


def seeded(seeds: jax.Array) -> jax.Array:
    """Typed keys [...] of integer seeds [...]: a seed gives the same sample in whatever batch it rides."""
    return jnp.vectorize(jax.random.key)(seeds)


def map_keys(function: Callable[..., jax.Array], keys: jax.Array, *args: jax.Array) -> jax.Array:
    """Maps `function(key, *args)` over all axes of `keys` and the same leading axes of `args`."""
    for _ in range(keys.ndim):
        function = jax.vmap(function)
    return function(keys, *args)


def sample(
    logits: jax.Array,
    cache: Cache,
    decode: Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]],
    keys: jax.Array,
    *,
    allowed: jax.Array,
    sampling: Sampling,
) -> Segment:
    """Draws one sequence a row, and leaves the loop when every row has ended.

    Row and position alone choose the random bits (`fold_in(keys[row], t)`), so a sample does not depend on its
    neighbours. Leaving early costs one all-reduce of a bool a token on a sharded batch; sequences without stop tokens
    have one length and never leave early.

    Args:
      logits: [..., v] of the first token, from the prefill.
      cache: carried through `decode`.
      decode: (tokens [...], i, cache) -> (logits [..., v] of token i + 1, cache), given token i.
      keys: typed PRNG keys [...].
      allowed: bool [v]; the stop tokens must be among them to end anything.

    Returns:
      Log-probabilities are the policy's, before `top_k` and `top_p`, so that the scorer agrees with them.
    """
    batch = logits.shape[:-1]
    max_tokens = sampling.max_tokens
    stops = jnp.array(sampling.stops, jnp.int32)

    def choose(logits, i, done):
        log_probs = tempered(logits, allowed, sampling.temperature or 1.0)
        if sampling.temperature:
            noise = map_keys(lambda k: jax.random.gumbel(jax.random.fold_in(k, i), logits.shape[-1:]), keys)
            token = jnp.argmax(narrowed(log_probs, sampling) + noise, axis=-1)
        else:
            token = jnp.argmax(log_probs, axis=-1)
        log_prob = jnp.take_along_axis(log_probs, token[..., None], axis=-1)[..., 0]
        token = jnp.where(done, 0, token).astype(jnp.int32)
        return token, jnp.where(done, 0.0, log_prob), done | (token[..., None] == stops).any(-1)

    def write(array, value, i):
        return jax.lax.dynamic_update_slice_in_dim(array, value[..., None], i, axis=-1)

    def more(carry):
        i, _, done, *_ = carry
        return (i < max_tokens) & ~done.all() if sampling.stops else i < max_tokens

    def body(carry):
        i, token, done, cache, segment = carry
        logits, cache = decode(token, i - 1, cache)
        token, log_prob, now_done = choose(logits, i, done)
        segment = Segment(
            write(segment.actions, token, i), write(segment.mask, ~done, i), write(segment.log_probs, log_prob, i)
        )
        return i + 1, token, now_done, cache, segment

    token, log_prob, done = choose(logits, 0, jnp.zeros(batch, bool))
    shape = (*batch, max_tokens)
    segment = Segment(
        write(jnp.zeros(shape, jnp.int32), token, 0),
        write(jnp.zeros(shape, bool), jnp.ones(batch, bool), 0),
        write(jnp.zeros(shape, jnp.float32), log_prob, 0),
    )
    return jax.lax.while_loop(more, body, (1, token, done, cache, segment))[-1]


def lengths(segment: Segment) -> jax.Array:
    """Number of actions that count [...], the end token included."""
    return segment.mask.sum(-1)


def content_lengths(segment: Segment, end_token: int) -> jax.Array:
    """Number of actions that count [...], the end token left out."""
    return (segment.mask & (segment.actions != end_token)).sum(-1)


def truncated(segment: Segment, end_token: int) -> jax.Array:
    """bool [...]: the sequence was cut off at the limit, without an end token."""
    return ~((segment.actions == end_token) & segment.mask).any(-1)


def log_probs(
    hidden: jax.Array,
    actions: jax.Array,
    head: Callable[[jax.Array], jax.Array],
    *,
    allowed: jax.Array,
    temperature: float,
    chunk: int,
) -> jax.Array:
    """Log-probability of each action from the hidden state before it, [..., t] in float32; 0 if it is not allowed.

    The vocabulary head runs inside a rematerialised scan over `chunk` tokens at a time: logits of the whole sequence
    [..., t, v] never exist, neither forward nor backward.

    Args:
      hidden: [..., t, d], the state that predicts each action.
      actions: int [..., t].
      head: [..., chunk, d] -> logits [..., chunk, v].
    """
    t = actions.shape[-1]
    chunk = min(chunk, t)
    count = -(-t // chunk)

    def split(x, axis):
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, count * chunk - t)
        x = jnp.pad(x, pad)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    axis = actions.ndim - 1

    @jax.checkpoint
    def score(_, xs):
        hidden, actions = xs
        inner = hidden.ndim - axis
        # Else the partitioner may gather the logits of the whole batch.
        logits = batch_kept(head(batch_kept(hidden, inner, spare=False)), spare=False)
        log_p = tempered(logits, allowed, temperature)
        picked = jnp.take_along_axis(log_p, actions[..., None], axis=-1)[..., 0]
        # Padding holds token 0, which may not be allowed; -inf there would turn a gradient of 0 into NaN.
        return None, jnp.where(allowed[actions], picked, 0.0)

    _, picked = jax.lax.scan(score, None, (split(hidden, axis), split(actions, axis)))
    return jnp.moveaxis(picked, 0, axis).reshape(*actions.shape[:-1], count * chunk)[..., :t]
