"""Families of unified multimodal models behind one small interface: `Family`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from uae_jax.sampling.tokens import Segment

Params = Any
Trajectory = dict[str, Segment]


class Family(NamedTuple):
    """Pure functions of (params, frozen, ...). Axes: b(atch) g(roup) t(okens); images are [.., H, W, 3] in 0..1, or the
    model's own batch of prompts with images of any size (`qwen2_5_vl.prompts.Prompt`).

    `params` holds what is trained, `frozen` everything else (see the family's `frozen_weights`).
    """

    # (params, frozen, images [b H W 3], keys [b g]) -> captions, Segment [b g t]
    generate: Callable[[Params, Params, Any, jax.Array], Segment]
    # (params, frozen, captions [b g t], images [b H W 3], keys [b g]) -> redrawn images [b g H W 3]
    redraw: Callable[[Params, Params, Segment, Any, jax.Array], jax.Array]
    # (params, frozen, images [b H W 3], trajectory) -> {segment: log-probabilities [b g t]}, with gradients
    log_probs: Callable[[Params, Params, Any, Trajectory], dict[str, jax.Array]]
