"""Long-CLIP (Zhang et al. 2024): CLIP that reads 248 tokens. Trained weights are a `CLIPModel` like any other."""

import dataclasses
from typing import Any

import numpy as np

from uae_jax.errors import UserError
from uae_jax.models.clip.config import Config

KEPT = 20  # well-trained first positions, which stay as they are
STRETCH = 4  # each later position becomes this many


def stretched_positions(table: np.ndarray) -> np.ndarray:
    """Knowledge-preserved stretching of position embeddings (section 3.1): [t, d] -> [4 t - 60, d]; 77 become 248.

    The first 20 stay; each later one is followed by three interpolated towards the next, and the last three extrapolate
    the final difference.

    Raises:
      UserError: there are too few positions.
    """
    if len(table) < KEPT + 2:
        raise UserError(f"{len(table)} positions cannot be stretched: the rule keeps {KEPT} and needs two more")
    later = table[KEPT:].astype(np.float32)
    steps = np.diff(later, axis=0)
    steps = np.concatenate([steps, steps[-1:]])
    parts = np.arange(STRETCH, dtype=np.float32)[:, None] / STRETCH
    grown = (later[:, None] + parts * steps[:, None]).reshape(-1, table.shape[1])
    return np.concatenate([table[:KEPT], grown.astype(table.dtype)])


def stretched(config: Config, params: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """A plain CLIP with its text positions stretched: where Long-CLIP's training starts."""
    positions = stretched_positions(np.asarray(params["text"]["position_embedding"]))
    text = dataclasses.replace(config.text, max_position_embeddings=len(positions))
    return (
        dataclasses.replace(config, text=text),
        {**params, "text": {**params["text"], "position_embedding": positions}},
    )
