"""Rewards: named functions of device arrays, and their weighted sum.

A tower's reward is the cosine of its features of two images (the paper's r(x, x^), with CLIP). What needs the caption's
string is a table over token ids (`well_formed`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.models import apply
from uae_jax.models.clip.model import CLIP

# OpenAI CLIP's pixel statistics.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalised(images: jax.Array, size: int) -> jax.Array:
    """Images [..., H, W, 3] in 0..1 -> [..., size, size, 3], resized and normalised for CLIP."""
    if images.shape[-3:-1] != (size, size):
        images = jax.image.resize(images, (*images.shape[:-3], size, size, 3), "cubic", antialias=True)
        images = jnp.clip(images, 0.0, 1.0)  # a cubic overshoots at edges; the 8-bit pixels CLIP was trained on cannot
    return (images - CLIP_MEAN) / CLIP_STD


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(-1, keepdims=True), 1e-12))


def clip_tower(module: CLIP) -> Callable[[Any, jax.Array], jax.Array]:
    """features(params, images [..., H, W, 3] in 0..1) -> unit vectors [..., d]."""

    def features(params: Any, images: jax.Array) -> jax.Array:
        pixels = normalised(images, module.config.vision.image_size)
        return unit(apply(module, params, pixels, method="image_features"))

    return features


Towers = Mapping[str, Callable[[Any, jax.Array], jax.Array]]


def similarities(towers: Towers, params: Any, images: jax.Array, redrawn: jax.Array) -> dict[str, jax.Array]:
    """Cosine of every redrawn image with its source, by tower.

    Args:
      images: sources [b, H, W, 3] in 0..1; their features are computed once.
      redrawn: [b, g, H, W, 3].

    Returns:
      {tower: [b, g]}, not clamped and not rescaled.
    """
    return {
        name: jnp.einsum(
            "bd,bgd->bg",
            features(params[name], images),
            features(params[name], redrawn),
            precision=jax.lax.Precision.HIGHEST,  # samples of a group differ by little; a TPU defaults to bfloat16
        )
        for name, features in towers.items()
    }


def weighted_sum(values: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The reward: sum of weights times named values."""
    return sum((weight * values[name] for name, weight in weights.items()), start=jnp.float32(0.0))


class Automaton(NamedTuple):
    """A grammar as a table over token ids: state 0 is the start."""

    transitions: np.ndarray  # int32 [states, vocab]
    accepting: np.ndarray  # bool [states]


def well_formed(tokens: jax.Array, lengths: jax.Array, automaton: Automaton) -> jax.Array:
    """Whether the first `lengths` tokens of each row [..., t] are a caption of the grammar; bool [...]."""
    transitions, accepting = jnp.asarray(automaton.transitions), jnp.asarray(automaton.accepting)

    def step(state, xs):
        token, i = xs
        return jnp.where(i < lengths, transitions[state, token], state), None

    start = jnp.zeros(tokens.shape[:-1], jnp.int32)
    state, _ = jax.lax.scan(step, start, (jnp.moveaxis(tokens, -1, 0), jnp.arange(tokens.shape[-1])))
    return accepting[state]
