"""Rewards: named functions of device arrays, and weighted sums of their products.

A tower's reward is the cosine of its features of two images (the paper's r(x, x^), with CLIP). What needs the caption's
string is a table over token ids (`well_formed`).
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from uae_jax import sharding
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.clip.model import CLIP
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov2.model import DINOv2
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.dinov3.model import DINOv3
from uae_jax.models.siglip.model import SigLIP
from uae_jax.pixels import CLIP_MEAN, CLIP_STD, Processing, process, processing

# Rewards of the caption alone; every other name is a tower, and a folder of weights.
OF_TEXT = ("length", "wellformed")


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


def embedding(config: Any, dtype: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """embed(params, pixels [..., size, size, 3]) -> unit vectors [..., d], of the tower that a config belongs to.

    CLIP's image embedding, the class token of DINOv2 and DINOv3 after the final norm, SigLIP's pooled embedding.

    Args:
      config: of a model folder (`convert.folder`); its class decides.
      dtype: compute type.

    Raises:
      UserError: it is no tower's config.
    """
    processing(config)  # refuses what is no tower
    if isinstance(config, DINOv2Config | DINOv3Config):
        dino: nn.Module = DINOv2(config, dtype) if isinstance(config, DINOv2Config) else DINOv3(config, dtype)
        return lambda params, pixels: unit(apply(dino, params, pixels)[..., 0, :])
    module: nn.Module = CLIP(config, dtype) if isinstance(config, CLIPConfig) else SigLIP(config, dtype)
    return lambda params, pixels: unit(apply(module, params, pixels, method="image_features"))


def tower(config: Any, dtype: Any, how: Processing | None = None) -> Callable[[Any, jax.Array], jax.Array]:
    """features(params, images [..., H, W, 3] in 0..1) -> unit vectors [..., d], smooth in the images.

    As `embedding`, after the tower's own processing.

    Args:
      how: of its folder (`pixels.load`); by default its class's.

    Raises:
      UserError: it is no tower's config.
    """
    embed, how = embedding(config, dtype), how or processing(config)
    return lambda params, images: embed(params, process(images, how))


Towers = Mapping[str, Callable[[Any, jax.Array], jax.Array]]


def similarities(towers: Towers, params: Any, images: jax.Array, redrawn: jax.Array) -> dict[str, jax.Array]:
    """Cosine of every redrawn image with its source, by tower.

    Args:
      params: of each tower; they may lie in host memory.
      images: sources [b, H, W, 3] in 0..1; their features are computed once.
      redrawn: [b, g, H, W, 3].

    Returns:
      {tower: [b, g]}, not clamped and not rescaled.
    """
    params = sharding.fetched(params)
    return {
        name: jnp.einsum(
            "bd,bgd->bg",
            features(params[name], images),
            features(params[name], redrawn),
            precision=jax.lax.Precision.HIGHEST,  # samples of a group differ by little; a TPU defaults to bfloat16
        )
        for name, features in towers.items()
    }


def factors(weights: Mapping[str, float]) -> list[str]:
    """The names in a reward's terms, each once: {"clip": 1.0, "dinov2*wellformed": 0.5} -> clip, dinov2, wellformed."""
    return list(dict.fromkeys(name for term in weights for name in term.split("*")))


def tower_names(config: Any) -> list[str]:
    """The towers that a config needs, for its reward or to be watched."""
    return [name for name in dict.fromkeys((*factors(config.reward), *config.monitor)) if name not in OF_TEXT]


def weighted_sum(values: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """The reward: sum of weights times named values, or times products of them ("clip*wellformed")."""

    def term(names: str) -> jax.Array:
        return functools.reduce(operator.mul, (values[name] for name in names.split("*")))

    return sum((weight * term(names) for names, weight in weights.items()), start=jnp.float32(0.0))


def brevity(lengths: jax.Array, budget: int) -> jax.Array:
    """The reward `length`: 1 for captions of at most `budget` tokens, budget / length for longer ones; float32."""
    return budget / jnp.maximum(lengths, budget).astype(jnp.float32)


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


def of_text(
    weights: Mapping[str, float], tokens: jax.Array, lengths: jax.Array, budget: int, automaton: Automaton | None
) -> dict[str, jax.Array]:
    """The rewards of the captions alone that `weights` names, float32 [...].

    Args:
      tokens: [..., t]; lengths: [...], without the end token.
      budget: tokens that `length` grants.
      automaton: the data's grammar, for `wellformed`.

    Raises:
      UserError: `wellformed` where the data has no grammar.
    """
    named = factors(weights)
    values = {"length": brevity(lengths, budget)} if "length" in named else {}
    if "wellformed" in named:
        if automaton is None:
            raise UserError("config.reward names 'wellformed', but this data has no grammar: leave it out")
        values["wellformed"] = well_formed(tokens, lengths, automaton).astype(jnp.float32)
    return values
