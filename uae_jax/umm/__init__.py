"""Families of unified multimodal models behind one small interface: `Family`."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from uae_jax.sampling.tokens import Segment

Params = Any
Trajectory = dict[str, Segment]


class Family(NamedTuple):
    """Pure functions of (params, frozen, ...). Axes: b(atch) g(roup) t(okens); images are [.., H, W, 3] in 0..1, or the
    model's own batch of prompts with images of any size (`qwen2_5_vl.prompts.Prompt`).

    `params` holds what is trained, `frozen` everything else (see the family's `build`). Whatever a family samples is a
    named segment: `caption` is what `generate` does, all others are of `redraw`.
    """

    # (params, frozen, images [b H W 3], keys [b g]) -> captions, Segment [b g t]
    generate: Callable[[Params, Params, Any, jax.Array], Segment]
    # (params, frozen, captions [b g t], images [b H W 3], keys [b g]) -> redrawn images [b g H W 3], and actions that
    # drew them, {segment: Segment [b g t]}: none where drawing is no policy
    redraw: Callable[[Params, Params, Segment, Any, jax.Array], tuple[jax.Array, Trajectory]]
    # (params, frozen, images [b H W 3], trajectory) -> {segment: log-probabilities [b g t]}, with gradients
    log_probs: Callable[[Params, Params, Any, Trajectory], dict[str, jax.Array]]


def learnt(names: Iterable[str], train: str) -> tuple[str, ...]:
    """The segments that `config.train` learns from: encoder, the caption; decoder, all others; both."""
    return tuple(name for name in names if train == "both" or (name == "caption") == (train == "encoder"))
