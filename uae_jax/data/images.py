"""Reads image files of any kind into square uint8 RGB arrays."""

import io
import os
import stat
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps

from uae_jax.errors import UserError
from uae_jax.printable import printable


class BadImage(UserError):
    """A file that is not a usable image: its `path` and the `reason`, both fit to be printed."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        self.path, self.reason = printable(os.fspath(path)), printable(reason)
        super().__init__(f"{self.path}: {self.reason}")


FITS = ("crop", "random_crop", "pad", "stretch")
# What Pillow may take a file for: none that starts another program (EPS) or is no picture of pixels (PDF, WMF).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")


class Limits(NamedTuple):
    """What a picture may be at most; more is refused before it is decoded."""

    max_bytes: int = 64 << 20  # of the file
    max_pixels: int | None = None  # height times width; None, or at most: `PIL.Image.MAX_IMAGE_PIXELS`


LIMITS = Limits()


def load_image(file: str | os.PathLike[str] | bytes, limits: Limits = LIMITS, name: str = "") -> Image.Image:
    """The picture in a file as RGB: upright by its EXIF orientation, alpha over white, first frame of animations.

    Greyscale of 16 bits is scaled to 8.

    Args:
      file: its path, or what stands in it.
      limits: of its size.
      name: of the record, for errors; a file's path by default.

    Raises:
      BadImage: missing, broken, truncated or not an image, or above the limits.
    """
    name = name or ("bytes" if isinstance(file, bytes) else os.fspath(file))
    try:
        if isinstance(file, bytes):
            length = len(file)
        else:
            found = os.stat(file)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                raise BadImage(name, "not a file")
            length = found.st_size
        if length > limits.max_bytes:
            raise BadImage(name, f"{length} bytes exceed the limit of {limits.max_bytes}")
        Image.init()  # what is not registered by now is not known at all
        formats = [name for name in FORMATS if name in Image.OPEN]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=formats) as image:
            most = [limit for limit in (Image.MAX_IMAGE_PIXELS, limits.max_pixels) if limit is not None]
            if most and image.width * image.height > min(most):
                raise BadImage(name, f"{image.width} x {image.height} exceeds the limit of {min(most)} pixels")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise BadImage(name, "not an image") from error
    except Exception as error:  # decoders raise anything on broken bytes: struct.error, SyntaxError, IndexError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(name, reason) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; PIL's own conversion of 16-bit grey clips at 255 instead of scaling."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.clip(np.asarray(image, np.float32), 0, 65535) / 257
        return Image.fromarray(np.round(levels).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int, how: str = "crop", rng: np.random.Generator | None = None) -> np.ndarray:
    """A picture as a square (bicubic, anti-aliased): uint8 [size, size, 3].

    Args:
      image: RGB.
      size: pixels a side.
      how: crop (the shortest side becomes `size`, the centre is kept), random_crop (a random part instead of the
        centre), pad (the longest side becomes `size`, white around it), stretch.
      rng: of random_crop; None keeps the centre.
    """
    bicubic = Image.Resampling.BICUBIC
    if how == "stretch":
        return np.asarray(image.resize((size, size), bicubic), np.uint8).copy()
    if how == "pad":
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        padded = Image.new("RGB", (size, size), "white")
        padded.paste(image.resize((width, height), bicubic), ((size - width) // 2, (size - height) // 2))
        return np.asarray(padded, np.uint8).copy()
    side = min(image.size)
    spare = (image.width - side, image.height - side)
    left, top = (x / 2 for x in spare)
    if how == "random_crop" and rng is not None:
        left, top = (int(rng.integers(0, x + 1)) for x in spare)
    # Resampling just the square that stays gives the same pixels, and a 1 x 100000 picture cannot fill the memory.
    square = image.resize((size, size), bicubic, box=(left, top, left + side, top + side))
    return np.asarray(square, np.uint8).copy()
