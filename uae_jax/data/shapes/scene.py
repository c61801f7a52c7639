"""Scenes of the shapes world: up to four objects on a 3 x 3 grid, drawn at random by (seed, index).

Splits are disjoint by seed: `split_seed(seed, split)` maps every (run seed, split) to its own sampling seed, so no two
splits share a (seed, index). The world is finite: there are 3,456 scenes of one object and 1.3 million of two, so
one-object scenes recur across splits; scenes of three and four objects practically never do.
"""

import dataclasses

import numpy as np

from uae_jax.errors import UserError

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SIZES = ("small", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BACKGROUNDS = ("black", "gray", "white", "brown")
SPLITS = ("train", "eval", "test")

GRID = 3
CELLS = GRID * GRID
MAX_OBJECTS = 4


@dataclasses.dataclass(frozen=True)
class Object:
    """One object, as indices into `SHAPES`, `COLOURS` and `SIZES`; its cell is 3 * row + column."""

    shape: int
    colour: int
    size: int
    cell: int

    @property
    def row(self) -> int:
        return self.cell // GRID

    @property
    def column(self) -> int:
        return self.cell % GRID


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background (index into `BACKGROUNDS`) and 1 to 4 objects in distinct cells, sorted by cell."""

    background: int
    objects: tuple[Object, ...]


def split_seed(seed: int, split: str) -> int:
    """The sampling seed of a split ("train", "eval", "test") in a run with this seed; injective in both."""
    return len(SPLITS) * seed + SPLITS.index(split)


def sample_scene(seed: int, index: int, max_objects: int = MAX_OBJECTS) -> Scene:
    """Scene number `index` of stream `seed`: a pure function of its arguments.

    The number of objects is uniform in 1..max_objects, cells are drawn without replacement, the rest is uniform.

    Raises:
      UserError: `max_objects` is not in 1..4, what a caption can name.
    """
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise UserError(f"max_objects must be in 1..{MAX_OBJECTS}, not {max_objects}")
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    n = int(rng.integers(1, max_objects + 1))
    background = int(rng.integers(len(BACKGROUNDS)))
    cells = np.sort(rng.permutation(CELLS)[:n]).tolist()
    shapes = rng.integers(len(SHAPES), size=n).tolist()
    colours = rng.integers(len(COLOURS), size=n).tolist()
    sizes = rng.integers(len(SIZES), size=n).tolist()
    return Scene(background, tuple(map(Object, shapes, colours, sizes, cells)))
