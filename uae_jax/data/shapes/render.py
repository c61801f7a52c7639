"""Draws scenes: every object is a tile of one cell, looked up in a table of all (background, shape, colour, size)."""

import functools

import numpy as np

from uae_jax.data.shapes.scene import BACKGROUNDS, COLOURS, GRID, SHAPES, SIZES, Scene
from uae_jax.errors import UserError

# At least 105 apart (Euclidean, 0..255) from each other and from every background.
COLOUR_RGB = {
    "red": (225, 20, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 240),
    "yellow": (255, 230, 20),
    "purple": (135, 20, 175),
    "orange": (255, 125, 0),
    "cyan": (20, 215, 235),
    "pink": (255, 130, 200),
}
BACKGROUND_RGB = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255), "brown": (100, 60, 25)}
RADIUS = {"small": 0.27, "large": 0.46}  # in cells
SUPERSAMPLE = 8


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x right, y down, in radii) lie inside the shape; bool, shaped like x."""
    if shape == "circle":
        return np.hypot(x, y) <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.95
    if shape == "triangle":
        return (y <= 0.85) & (np.abs(x) <= (y + 1) / 1.85)
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.08
    if shape == "cross":
        return (np.maximum(np.abs(x), np.abs(y)) <= 1) & (np.minimum(np.abs(x), np.abs(y)) <= 0.3)
    if shape == "ring":
        return (np.hypot(x, y) <= 1) & (np.hypot(x, y) >= 0.55)
    raise ValueError(shape)


def glyphs(cell: int) -> np.ndarray:
    """Anti-aliased coverage in 0..1 of every shape and size in a cell of `cell` pixels: float32 [6, 2, cell, cell]."""
    fine = cell * SUPERSAMPLE
    axis = (np.arange(fine) + 0.5) / fine - 0.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    masks = np.stack([[_inside(s, x / RADIUS[z], y / RADIUS[z]) for z in SIZES] for s in SHAPES])
    boxes = masks.reshape(len(SHAPES), len(SIZES), cell, SUPERSAMPLE, cell, SUPERSAMPLE)
    return boxes.mean(axis=(3, 5), dtype=np.float32)


@functools.lru_cache(maxsize=8)
def _tiles(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Empty images [4, S, S, 3] by background, and tiles [4, 6, 8, 2, c, c, 3] by background, shape, colour, size."""
    if image_size <= 0 or image_size % (2 * GRID):
        raise UserError(f"image_size must be a positive multiple of {2 * GRID}, not {image_size}")
    ground = np.array([BACKGROUND_RGB[name] for name in BACKGROUNDS], np.float32)
    colour = np.array([COLOUR_RGB[name] for name in COLOURS], np.float32)
    mask = glyphs(image_size // GRID)[None, :, None, :, :, :, None]
    ground_ = ground[:, None, None, None, None, None, :]
    tiles = ground_ + mask * (colour[None, None, :, None, None, None, :] - ground_)
    empty = np.broadcast_to(ground[:, None, None, :], (len(ground), image_size, image_size, 3))
    return empty.astype(np.uint8), np.round(tiles).astype(np.uint8)


def render(scene: Scene, image_size: int = 48) -> np.ndarray:
    """The picture of a scene: uint8 [S, S, 3], height, width, RGB.

    Raises:
      UserError: `image_size` is not a positive multiple of 6.
    """
    empty, tiles = _tiles(image_size)
    cell = image_size // GRID
    image = empty[scene.background].copy()
    for o in scene.objects:
        top, left = o.row * cell, o.column * cell
        image[top : top + cell, left : left + cell] = tiles[scene.background, o.shape, o.colour, o.size]
    return image
