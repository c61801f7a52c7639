"""What each tower's image processor does to a picture, on the device: resize, crop, normalise.

The processors differ: in size, in what they crop, in the kernel, in the statistics, and in whether they resize 8-bit
pixels (and so round after each of the two passes) or floats. What a tower's folder says of it
(preprocessor_config.json) goes before what its class was released with.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import storage
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
KERNELS = {2: "linear", 3: "cubic"}  # by PIL's number
FILES = ("preprocessor_config.json", "processor_config.json")  # transformers 5 writes the second for whole processors


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


def _sizes(default: Processing, values: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """`Processing.size` and `.shortest`; None where pictures would not come out as squares of one size."""

    def side(value: Any, *names: str) -> int | None:
        """A number, or an object of these fields that are all the same."""
        if isinstance(value, Mapping):
            value = value.get(names[0]) if set(value) == set(names) and len({*value.values()}) == 1 else None
        return value if isinstance(value, int) and value > 0 else None

    size, crop = values.get("size"), values.get("crop_size")
    if not values.get("do_center_crop", default.shortest is not None):
        if size is None:
            return None if default.shortest else (default.size, None)
        both = side(size, "height", "width")
        return None if both is None else (both, None)
    end = default.size if crop is None else side(crop, "height", "width")
    if end is None or (isinstance(size, Mapping) and side(size, "height", "width") == end):
        return None if end is None else (end, None)
    short = (default.shortest or end) if size is None else side(size, "shortest_edge")
    return None if short is None or short < end else (end, short)


def declared(default: Processing, values: Mapping[str, Any], seen: int | None) -> Processing:
    """A class's processing as a preprocessor_config.json changes it; fields left out, or null, change nothing.

    Args:
      seen: pixels of each side that the tower was built for; None: any.

    Raises:
      UserError: lists everything that is not done here, or that contradicts the tower.
    """
    values = {name: value for name, value in values.items() if value is not None}
    problems = [
        f"{name} is false" for name in ("do_resize", "do_rescale", "do_normalize") if not values.get(name, True)
    ]
    if abs(values.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        problems.append(f"rescale_factor {values['rescale_factor']} is not 1/255")
    if values.get("resample", 3) not in KERNELS:
        problems.append(f"resample {values['resample']} is neither 2 (bilinear) nor 3 (bicubic)")
    statistics = {}
    for name, mine in (("image_mean", default.mean), ("image_std", default.std)):
        given = values.get(name, mine)
        try:
            statistics[name] = np.asarray(given, np.float32)
        except (TypeError, ValueError):
            statistics[name] = np.zeros(0, np.float32)
        if statistics[name].shape != (3,) or (name == "image_std" and not (statistics[name] > 0).all()):
            problems.append(f"{name} {given} is not a number for each of 3 channels")
    sizes = _sizes(default, values)
    if sizes is None:
        told = ", ".join(f"{k} {values[k]}" for k in ("size", "crop_size", "do_center_crop") if k in values)
        problems.append(f"{told} does not end in one square")
    elif seen is not None and sizes[0] != seen:
        problems.append(f"it makes pictures of {sizes[0]} pixels a side, but config.json says image_size {seen}")
    if problems:
        raise UserError("; ".join(problems))
    assert sizes is not None
    kernel = KERNELS[values["resample"]] if "resample" in values else default.kernel
    return Processing(*sizes, kernel, default.eight_bit, statistics["image_mean"], statistics["image_std"])


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


def load(folder: Path, config: Any) -> Processing:
    """The processing of a tower's folder: its class's, as the folder's own files change it.

    Raises:
      UserError: it is no tower's config; or a file is not JSON, or asks for what is not done or contradicts the tower.
    """
    default = processing(config)
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text())
            values = values.get("image_processor") if name == FILES[1] else values
            if not isinstance(values, dict):
                continue
            return declared(default, values, _seen(config))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}): copy it again") from None
        except UserError as error:
            raise UserError(f"{path} does not fit the tower: {error}") from None
    return default


def _seen(config: Any) -> int | None:
    """The side of the pictures that a tower was built for; the DINOs take any."""
    return config.vision.image_size if isinstance(config, CLIPConfig | SigLIPConfig) else None


def save(folder: Path, how: Processing) -> None:
    """Writes preprocessor_config.json, for `load` and for transformers."""
    both = {"height": how.size, "width": how.size}
    values = {
        "do_resize": True,
        "size": both if how.shortest is None else {"shortest_edge": how.shortest},
        "resample": next(number for number, kernel in KERNELS.items() if kernel == how.kernel),
        "do_center_crop": how.shortest is not None,
        **({} if how.shortest is None else {"crop_size": both}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [float(str(x)) for x in how.mean],
        "image_std": [float(str(x)) for x in how.std],
    }
    storage.write_atomic(folder / FILES[0], (json.dumps(values, indent=2) + "\n").encode())
