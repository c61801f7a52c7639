"""Reads image files of any kind into square uint8 RGB arrays."""

import os

import numpy as np
import PIL
from PIL import Image, ImageOps

from uae_jax.errors import UserError


class BadImage(UserError):
    """A file that is not a usable image: its `path` and the `reason`."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file as RGB: upright by its EXIF orientation, alpha over white, first frame of animations.

    Greyscale of 16 bits is scaled to 8.

    Raises:
      BadImage: missing, broken, truncated or not an image, or more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise BadImage(path, f"{image.width} x {image.height} exceeds PIL's limit of {limit} pixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise BadImage(path, "not an image") from error
    except Exception as error:  # decoders raise anything on broken bytes: struct.error, SyntaxError, IndexError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(path, reason) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; PIL's own conversion of 16-bit grey clips at 255 instead of scaling."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.clip(np.asarray(image, np.float32), 0, 65535) / 257
        return Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the shortest side to `size` (bicubic, anti-aliased) and crops the centre: uint8 [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Resampling just the square that stays gives the same pixels, and a 1 x 100000 picture cannot fill the memory.
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(square, np.uint8).copy()
