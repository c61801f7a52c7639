"""From conversations and pictures of any size to a batch of prompts of one static shape.

Everything that depends on lengths and sizes is computed here, by the host, and is data of the program: one compilation
serves several images a prompt, one, or none. A batch whose images all have one size (`alike`) is the same thing, with
leading axes of 1 and patches cut on the device.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl import inputs
from uae_jax.models.qwen2_5_vl.config import Config, VisionConfig
from uae_jax.models.qwen2_5_vl.vision import Layout


class Prompt(NamedTuple):
    """Prompts, right-aligned in p slots. A leading axis of 1 means that all prompts are alike in it."""

    tokens: Any  # int32 [b, p]: one image placeholder a merged patch
    mask: Any  # bool [b, p]: False for the padding on the left
    positions: Any  # int32 [b, 3, p]: rotary (time, height, width)
    following: Any  # int32 [b]: rotary position of the first token of the answer
    patches: Any = None  # float32 [b, w, l, patch_dim]; None: text only
    layout: Layout | None = None  # of the patches


class Budget(NamedTuple):
    """Room that each prompt of a batch has."""

    tokens: int  # p
    windows: int  # w, over all images of a prompt; 0: text only
    merged: int  # tokens of all images of a prompt


class Processor(NamedTuple):
    """How a picture becomes an image of the model: transformers' `Qwen2VLImageProcessor`, without its patches."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = tuple(inputs.IMAGE_MEAN.tolist())
    std: tuple[float, ...] = tuple(inputs.IMAGE_STD.tolist())

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Processor":
        """Parses `preprocessor_config.json`; the bounds are areas in pixels, under older or newer names.

        Raises:
          UserError: it asks for something else than bicubic resizing to multiples, rescaling and normalising.
        """
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if not values.get(name, True):
                raise UserError(f"preprocessor_config.json: {name} = false is not supported")
        resample = values.get("resample", Image.Resampling.BICUBIC)
        if resample != Image.Resampling.BICUBIC:
            raise UserError(f"preprocessor_config.json: resample = {resample} is not supported, only 3 (bicubic)")
        size = values.get("size") or {}
        default = cls()
        return cls(
            values.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
            values.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
            tuple(values.get("image_mean") or default.mean),
            tuple(values.get("image_std") or default.std),
        )

    def __call__(self, picture: Image.Image, config: VisionConfig) -> np.ndarray:
        """Resizes (`inputs.smart_resize`, bicubic) and normalises: float32 [height, width, 3].

        Raises:
          UserError: one side is more than 200 times the other.
        """
        unit = config.patch_size * config.spatial_merge_size
        height, width = inputs.smart_resize(picture.height, picture.width, unit, self.min_pixels, self.max_pixels)
        pixels = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        return (np.asarray(pixels, np.float32) / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation that the assistant is to answer, with one placeholder an image.

    Args:
      tokenizer: transformers', with a chat template (`AutoTokenizer.from_pretrained(folder)`).
      messages: [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}, ...].

    Raises:
      UserError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template: its folder must hold chat_template.jinja or name one")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def expand(ids: Sequence[int], grids: Sequence[tuple[int, int]], config: Config) -> np.ndarray:
    """Repeats the i-th image placeholder once a merged patch of the i-th grid (rows, columns of patches): int32 [t].

    Raises:
      UserError: there are more placeholders, or fewer, than grids.
    """
    found = list(ids).count(config.image_token_id)
    if found != len(grids):
        raise UserError(f"prompt has {found} image placeholders for {len(grids)} images")
    counts = iter(rows * columns // config.vision.merge_unit for rows, columns in grids)
    repeated = ([token] * (next(counts) if token == config.image_token_id else 1) for token in ids)
    return np.array(list(itertools.chain.from_iterable(repeated)), np.int32)


Row = tuple[Sequence[int], Sequence[np.ndarray]]


def needed(rows: Sequence[Row], config: Config) -> Budget:
    """The least budget that holds these prompts; see `batch`."""
    sizes = []
    for ids, images in rows:
        layouts = [inputs.layout(height, width, config.vision)[0] for height, width, _ in (x.shape for x in images)]
        merged = sum(len(where.order) for where in layouts)
        windows = sum(len(where.frames) for where in layouts)
        sizes.append(Budget(len(ids) - len(images) + merged, windows, merged))
    return Budget(*map(max, zip(*sizes, strict=True)))


def batch(rows: Sequence[Row], budget: Budget, config: Config) -> Prompt:
    """Puts prompts of any length with images of any size into one shape, padded.

    Args:
      rows: for each prompt its token ids, with one placeholder an image (`encode_chat`), and its images, normalised
        float32 [height, width, 3] (`Processor`).

    Returns:
      NumPy arrays with b = len(rows).

    Raises:
      UserError: a prompt does not fit the budget, or has other images than placeholders.
    """
    b, p, vision = len(rows), budget.tokens, config.vision
    tokens = np.full((b, p), config.pad_token_id, np.int32)
    mask = np.zeros((b, p), bool)
    positions = np.zeros((b, 3, p), np.int32)
    following = np.zeros(b, np.int32)
    packed = []
    for i, (ids, images) in enumerate(rows):
        sizes = [(height, width) for height, width, _ in (x.shape for x in images)]
        grids = [inputs.grid(height, width, vision) for height, width in sizes]
        row = expand(ids, grids, config)
        if len(row) > p:
            raise UserError(f"prompt {i} has {len(row)} tokens, its images included; the budget is {p}")
        start = p - len(row)
        tokens[i, start:], mask[i, start:] = row, True
        positions[i, :, start:], following[i] = inputs.rope_positions(row, grids, config)
        layouts = [inputs.layout(height, width, vision)[0] for height, width in sizes]
        parts = [(inputs.patchify(x, vision), layout) for x, layout in zip(images, layouts, strict=True)]
        packed.append(inputs.pack(parts, budget.windows, budget.merged, vision))
    if not budget.windows:
        return Prompt(tokens, mask, positions, following)
    patches, layout = jax.tree.map(lambda *x: np.stack(x), *packed)
    return Prompt(tokens, mask, positions, following, patches, layout)


def alike(ids: Sequence[int], images: jax.Array, config: Config) -> Prompt:
    """One prompt for images of one size: only the patches have a batch axis, the rest are constants of the program.

    Args:
      ids: with one image placeholder.
      images: [b, height, width, 3] in 0..1, on the device.
    """
    _, height, width, _ = images.shape
    grid = inputs.grid(height, width, config.vision)
    tokens = expand(ids, [grid], config)
    positions, following = inputs.rope_positions(tokens, [grid], config)
    layout, _ = inputs.layout(height, width, config.vision)
    pixels = (images - inputs.IMAGE_MEAN) / inputs.IMAGE_STD
    return Prompt(
        tokens[None],
        np.ones((1, len(tokens)), bool),
        positions[None],
        np.full(1, following, np.int32),
        inputs.patchify(jnp.asarray(pixels), config.vision),
        jax.tree.map(lambda x: x[None], layout),
    )
