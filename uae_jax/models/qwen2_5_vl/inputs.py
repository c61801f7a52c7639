"""What the host prepares for Qwen2.5-VL: image sizes, patches laid out by window, rotary positions of a prompt.

Layouts are NumPy; `patchify` is a reshape of the picture and works on NumPy and on (traced) jax arrays alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.config import Config, VisionConfig
from uae_jax.models.qwen2_5_vl.vision import Layout

# Of CLIP, on pixels in 0..1.
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size nearest to `height` x `width` whose sides `factor` divides and whose area is within bounds.

    As `smart_resize` of transformers' Qwen2-VL image processor: halves are rounded to even.

    Raises:
      UserError: a side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"image of {height} x {width} pixels: one side is more than 200 times the other")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return h, w


def grid(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """Rows and columns of patches of an image.

    Raises:
      UserError: a side is no multiple of patch_size * spatial_merge_size.
    """
    unit = config.patch_size * config.spatial_merge_size
    if height < unit or width < unit or height % unit or width % unit:
        raise UserError(f"image of {height} x {width} pixels: both sides must be multiples of {unit}")
    return height // config.patch_size, width // config.patch_size


def _windows(rows: int, columns: int, config: VisionConfig) -> tuple[int, int]:
    """Windows down and across a grid of patches, the ragged ones included."""
    side = config.window_side * config.spatial_merge_size
    return -(-rows // side), -(-columns // side)


def layout(height: int, width: int, config: VisionConfig) -> tuple[Layout, np.ndarray]:
    """Lays the patches of one image out by window.

    Windows are in raster order, merged tokens in raster order in their window, and the 4 patches of a merged token
    consecutive. A window over the edge keeps its shape, and holds padding there.

    Args:
      height, width: pixels.

    Returns:
      The layout (without batch axes; frames are 0 or -1), and `source` [w, l]: the index of each slot's patch in the
      order of transformers' image processor (merged tokens in raster order, each with its 4 patches); -1 = padding.

    Raises:
      UserError: a side is no multiple of patch_size * spatial_merge_size.
    """
    rows, columns = grid(height, width, config)
    down, across = _windows(rows, columns, config)
    m, side = config.spatial_merge_size, config.window_side

    def by_window(x: np.ndarray) -> np.ndarray:  # [down * side * m, across * side * m] -> [w, l]
        x = x.reshape(down, side, m, across, side, m).transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(down * across, (side * m) ** 2)

    row, column = np.mgrid[: down * side * m, : across * side * m].astype(np.int32)
    real = (row < rows) & (column < columns)
    merged = (row // m) * (columns // m) + column // m
    source = np.where(real, merged * config.merge_unit + (row % m) * m + column % m, -1)
    slots: np.ndarray = np.arange(down * across * side**2, dtype=np.int32).reshape(down, across, side, side)
    slots = slots.transpose(0, 2, 1, 3).reshape(down * side, across * side)
    return (
        Layout(
            positions=np.stack([by_window(row), by_window(column)], axis=-1),
            frames=by_window(np.where(real, 0, -1).astype(np.int32)),
            order=slots[: rows // m, : columns // m].reshape(-1),
        ),
        by_window(source),
    )


def patchify(images: Any, config: VisionConfig) -> Any:
    """Cuts images into patches, laid out as `layout` says.

    Args:
      images: float [..., height, width, channels], normalised by IMAGE_MEAN and IMAGE_STD; NumPy or jax.

    Returns:
      [..., w, l, patch_dim]; a patch is (channel, frame, row, column), its one frame repeated; padding slots are 0.

    Raises:
      UserError: a side is no multiple of patch_size * spatial_merge_size.
    """
    xp: Any = np if isinstance(images, np.ndarray) else jnp
    *batch, height, width, channels = images.shape
    down, across = _windows(*grid(height, width, config), config)
    p, m, side, n = config.patch_size, config.spatial_merge_size, config.window_side, len(batch)
    ragged = [(0, 0)] * n + [(0, down * side * m * p - height), (0, across * side * m * p - width), (0, 0)]
    x = xp.pad(images, ragged) if any(after for _, after in ragged) else images
    x = x.reshape(*batch, down, side, m, p, across, side, m, p, channels)
    #     window row, column, merged row, column, row, column in it, channel, pixel row, column
    axes = (0, 4, 1, 5, 2, 6, 8, 3, 7)
    x = x.transpose(*range(n), *(n + axis for axis in axes))
    x = x.reshape(*batch, down * across, (side * m) ** 2, channels, 1, p * p)
    x = xp.broadcast_to(x, (*x.shape[:-2], config.temporal_patch_size, p * p))
    return x.reshape(*x.shape[:-3], config.patch_dim)


def pack(
    images: Sequence[tuple[np.ndarray, Layout]], windows: int, tokens: int, config: VisionConfig
) -> tuple[np.ndarray, Layout]:
    """Puts the images of one row, whatever their sizes, into one budget of windows and merged tokens.

    Args:
      images: patches [w_i, l, patch_dim] and layout of each image, in the order of the prompt.
      windows: w of the result.
      tokens: n of the result.

    Returns:
      Patches [w, l, patch_dim] and their layout: image i is frame i. Padding is 0, and -1 in frames.

    Raises:
      UserError: the images need more windows or tokens.
    """
    used = sum(len(patches) for patches, _ in images)
    merged = sum(len(part.order) for _, part in images)
    if used > windows or merged > tokens:
        raise UserError(f"images need {used} windows and {merged} merged tokens; the budget is {windows} and {tokens}")
    per_window = config.window_side**2
    slots = per_window * config.merge_unit
    packed = np.zeros((windows, slots, config.patch_dim), np.float32)
    positions = np.zeros((windows, slots, 2), np.int32)
    frames = np.full((windows, slots), -1, np.int32)
    order = np.zeros(tokens, np.int32)
    window = token = 0
    for frame, (patches, part) in enumerate(images):
        here = slice(window, window + len(patches))
        packed[here] = patches
        positions[here] = part.positions
        frames[here] = np.where(part.frames >= 0, frame, -1)
        order[token : token + len(part.order)] = part.order + window * per_window
        window, token = window + len(patches), token + len(part.order)
    return packed, Layout(positions, frames, order)


def rope_positions(tokens: np.ndarray, grids: Sequence[tuple[int, int]], config: Config) -> tuple[np.ndarray, int]:
    """Rotary positions of a prompt with still images (`Qwen2_5_VLModel.get_rope_index`).

    Text counts up on all three axes at once. An image stands still in time, counts its rows and columns of merged
    tokens, and the text after it goes on past the larger of the two.

    Args:
      tokens: int [t], without padding.
      grids: rows and columns of patches of each image, in order.

    Returns:
      int32 [3, t], and the position of the token that comes next.

    Raises:
      UserError: image placeholders and `grids` do not match.
    """
    m = config.vision.spatial_merge_size
    placeholder = np.asarray(tokens) == config.image_token_id
    expected = sum((rows // m) * (columns // m) for rows, columns in grids)
    if placeholder.sum() != expected:
        raise UserError(f"prompt has {placeholder.sum()} image placeholders, its images have {expected} tokens")
    positions = np.empty((3, len(placeholder)), np.int32)
    remaining = iter(grids)
    at = following = 0
    while at < len(placeholder):
        if not placeholder[at]:
            positions[:, at] = following
            at, following = at + 1, following + 1
            continue
        rows, columns = (side // m for side in next(remaining))
        end = at + rows * columns
        if not placeholder[at:end].all():
            raise UserError(f"prompt has fewer than {rows * columns} image placeholders in a row at token {at}")
        row, column = np.mgrid[:rows, :columns].reshape(2, -1)
        positions[:, at:end] = following + np.stack([np.zeros_like(row), row, column])
        at, following = end, following + max(rows, columns)
    return positions, following
