"""The attribute judge of the shapes world: a small convolutional network that names what stands in every cell.

It shares nothing with the reward towers: another architecture, other labels, other training. Weights are kept under our
own names, since there is no reference class.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from uae_jax.convert.table import CONV2D, LINEAR, Entry
from uae_jax.errors import UserError
from uae_jax.models.dense import Dense
from uae_jax.sharding import COPIED, Rules, Split


@dataclasses.dataclass(frozen=True)
class Config:
    """Cells a side, channels, and the number of classes of each attribute (0 = empty cell)."""

    grid: int = 3
    channels: int = 48
    shapes: int = 7
    colours: int = 9
    sizes: int = 3
    backgrounds: int = 4

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        try:
            return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
        except KeyError as error:
            raise UserError(f"the judge's config.json lacks {error}") from None

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["CellClassifier"], **dataclasses.asdict(self)}

    @property
    def outputs(self) -> dict[str, int]:
        """Classes per attribute of a cell."""
        return {"shape": self.shapes, "colour": self.colours, "size": self.sizes}


class CellClassifier(nn.Module):
    """Three strided convolutions, pooled to the grid, with a linear head per cell and one for the background."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """images [..., H, W, 3] in 0..1 -> logits of shape, colour, size [..., cells, c] and background [..., c]."""
        c = self.config
        x = images * 2.0 - 1.0
        for i, (features, stride) in enumerate([(c.channels // 2, 2), (c.channels, 2), (2 * c.channels, 1)]):
            x = nn.gelu(nn.Conv(features, (3, 3), (stride, stride), name=f"conv_{i}")(x))
        *batch, height, width, channels = x.shape
        x = x.reshape(*batch, c.grid, height // c.grid, c.grid, width // c.grid, channels)
        x = jnp.moveaxis(x, -4, -3).reshape(*batch, c.grid**2, -1)
        x = nn.gelu(Dense(2 * c.channels, name="cell")(x))
        logits = Dense(sum(c.outputs.values()), name="attributes")(x)
        splits = jnp.split(logits, [c.shapes, c.shapes + c.colours], axis=-1)
        background = Dense(c.backgrounds, name="background")(x.mean(-2))
        return dict(zip(c.outputs, splits, strict=True)) | {"background": background}


def table(config: Config, image_size: int = 48) -> list[Entry]:
    """Names of the shipped file."""
    c = config
    widths = [3, c.channels // 2, c.channels, 2 * c.channels]
    cell = (image_size // 4 // c.grid) ** 2 * widths[-1]
    linear = {
        "cell": (2 * c.channels, cell),
        "attributes": (sum(c.outputs.values()), 2 * c.channels),
        "background": (c.backgrounds, 2 * c.channels),
    }
    entries = []
    for i in range(3):
        entries += [
            Entry(f"conv_{i}/kernel", f"conv_{i}.weight", (widths[i + 1], widths[i], 3, 3), CONV2D),
            Entry(f"conv_{i}/bias", f"conv_{i}.bias", (widths[i + 1],)),
        ]
    for name, shape in linear.items():
        entries += [
            Entry(f"{name}/kernel", f"{name}.weight", shape, LINEAR),
            Entry(f"{name}/bias", f"{name}.bias", shape[:1]),
        ]
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `CellClassifier(config)`: tensor splits no part of it."""
    return (*COPIED, (r"(?:.*/)?kernel", Split.GATHERED))
