"""What each tower's image processor does to a picture, on the device: resize, crop, normalise.

The processors differ: in size, in what they crop, in the kernel, in the statistics, and in whether they resize 8-bit
pixels (and so round after each of the two passes) or floats.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.errors import UserError
from uae_jax.models import resample
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.siglip.config import Config as SigLIPConfig

# OpenAI CLIP's pixel statistics, and ImageNet's.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
HALF = np.full(3, 0.5, np.float32)


class Processing(NamedTuple):
    """A tower's image processor."""

    size: int  # pixels of each side of what the tower sees
    shortest: int | None  # the shortest side is resized to this and the centre is cropped; None: both sides to `size`
    kernel: str  # of `resample.matrix`
    eight_bit: bool  # resizes 8-bit pixels
    mean: np.ndarray
    std: np.ndarray


def processing(config: Any) -> Processing:
    """The image processor that a tower of this config was released with.

    CLIP (and Long-CLIP): CLIPImageProcessor. DINOv2: BitImageProcessor, 256 then 224 whatever the size of its position
    table. DINOv3: DINOv3ViTImageProcessor. SigLIP: SiglipImageProcessor.

    Raises:
      UserError: it is no tower's config.
    """
    match config:
        case CLIPConfig():
            size = config.vision.image_size
            return Processing(size, size, "cubic", True, CLIP_MEAN, CLIP_STD)
        case DINOv2Config():
            return Processing(224, 256, "cubic", True, IMAGENET_MEAN, IMAGENET_STD)
        case DINOv3Config():
            return Processing(config.image_size, None, "linear", False, IMAGENET_MEAN, IMAGENET_STD)
        case SigLIPConfig():
            return Processing(config.vision.image_size, None, "cubic", True, HALF, HALF)
    raise UserError(f"{type(config).__module__} is no image tower: use CLIP, LongCLIP, DINOv2, DINOv3 or SigLIP")


def process(images: jax.Array, how: Processing, rounded: bool = False) -> jax.Array:
    """Images [..., H, W, 3] in 0..1 -> [..., size, size, 3], resized, cropped and normalised in float32.

    Args:
      rounded: round to 8 bits wherever the processor does, for its own numbers to within one level; without, the result
        is smooth in the images.
    """
    height, width = images.shape[-3:-1]
    if how.shortest is None:
        new_height = new_width = how.size
    else:
        short = min(height, width)
        new_height, new_width = (how.shortest if x == short else int(how.shortest * x / short) for x in (height, width))
    rounded = rounded and how.eight_bit

    def levels(x: jax.Array) -> jax.Array:
        # A cubic overshoots at edges, which 8-bit pixels cannot.
        return jnp.clip(jnp.floor(x * 255 + 0.5) / 255 if rounded else x, 0.0, 1.0)

    x = images.astype(jnp.float32)
    # Only what the crop keeps is resampled: a 1 x 100000 picture cannot fill the memory.
    for axis, old, new in ((-2, width, new_width), (-3, height, new_height)):
        start = (new - how.size) // 2
        weights = resample.matrix(old, new, how.kernel, start, how.size)
        if not np.array_equal(weights, np.eye(how.size, old)):
            x = levels(resample.apply(weights, x, axis))
    return (x - how.mean) / how.std
