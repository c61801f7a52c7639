"""Pictures with captions, of a jsonl file of {"image": path, "caption": text} or of TFDS; batches by (seed, step)."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from uae_jax.data import images
from uae_jax.errors import UserError


class Pair(NamedTuple):
    """One picture, or where it lies, with its caption."""

    image: Path | np.ndarray
    caption: str


class Pairs(Protocol):
    """Pairs by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pair: ...


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """The pairs of a jsonl file; a relative image path is relative to the file. Pictures are not opened.

    Raises:
      UserError: the file is missing or empty, or a line (named by its number) is no such object.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.path: {path} cannot be read ({error}): name a jsonl file") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            image, caption = values["image"], values["caption"]
            if not (isinstance(image, str) and isinstance(caption, str)):
                raise TypeError("both are to be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"image": path, "caption": text}} ({type(error).__name__}: {error})'
            ) from None
        pairs.append(Pair(path.parent / image, caption))
    if not pairs:
        raise UserError(f"{path} holds no pairs")
    return pairs


class TfdsPairs:
    """The pairs of a dataset that TFDS has prepared as array_record, read at random and without TensorFlow.

    Args:
      folder: DATASET/VERSION in TFDS' data folder.
      split: of the dataset, in TFDS' syntax ("train[:90%]").
      image_key, caption_key: its features, "a/b" for one inside another; of several captions the first is taken.

    Raises:
      UserError: there is no such dataset, split or feature, or it is not stored as array_record.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, image_key: str, caption_key: str):
        import tensorflow_datasets as tfds

        self.image_key, self.caption_key = image_key, caption_key
        try:
            builder = tfds.builder_from_directory(os.fspath(folder))
            self.source = builder.as_data_source(split=split)
        except Exception as error:  # of many kinds, most of them long
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"config.data.path: {folder} is no dataset DATASET/VERSION that TFDS has prepared with "
                f"file_format='array_record', or has no split {split!r} ({reason})"
            ) from None
        self.name = f"{builder.info.full_name} {split} {image_key} {folder}"
        self[0]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        example = self.source[index]
        image, caption = (self._feature(example, key) for key in (self.image_key, self.caption_key))
        if not isinstance(caption, str | bytes):
            caption = caption[0]
        caption = caption.decode() if isinstance(caption, bytes) else str(caption)
        return Pair(np.asarray(image), caption)

    def _feature(self, example: Any, key: str) -> Any:
        for part in key.split("/"):
            if not isinstance(example, Mapping) or part not in example:
                has = ", ".join(example) if isinstance(example, Mapping) else "no features"
                raise UserError(f"config.decoder: the dataset has no feature {key!r}: there is {has}")
            example = example[part]
        return example


def picture(pair: Pair, size: int) -> np.ndarray:
    """uint8 [size, size, 3]. Raises BadImage where the pair's picture cannot be read."""
    if isinstance(pair.image, Path):
        return images.fit(images.load_image(pair.image), size)
    pixels = pair.image.repeat(3, axis=-1) if pair.image.shape[-1] == 1 else pair.image[..., :3]
    return images.fit(Image.fromarray(pixels), size)


class PairBatches:
    """Batch `step` is a pure function of (seed, step); each epoch is another order of all pairs, without a gap.

    Items: {"image": uint8 [b, S, S, 3], "tokens": int32 [b, t], "length": int32 [b] without the end token}; with
    `latents` "moments" [b, h, w, 2 c] in place of the images. A picture that cannot be read is replaced by the next
    that can, caption included, with a warning.

    Attributes:
      pairs: `read_pairs` or `TfdsPairs`.
      latents: the pictures' Gaussians by number, raising BadImage as `picture` does (`data.latents`); None: images.
      length: t; longer captions are cut, so that they end with the end token.
      dropout: share of captions that are replaced by `negative`, the unconditional branch of guidance.
    """

    def __init__(
        self,
        pairs: Pairs,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        batch_size: int,
        length: int,
        end_token: int,
        dropout: float,
        negative: tuple[int, ...],
        seed: int,
        latents: Any = None,
    ):
        self.latents = latents
        self.pairs, self.tokenizer, self.image_size, self.batch_size = pairs, tokenizer, image_size, batch_size
        self.length, self.end_token, self.dropout, self.negative, self.seed = length, end_token, dropout, negative, seed

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pairs))
        return int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pairs))[place])

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        for offset in range(len(self.pairs)):
            pair = self.pairs[(index + offset) % len(self.pairs)]
            try:
                if self.latents is not None:
                    return self.latents[(index + offset) % len(self.pairs)], pair.caption
                return picture(pair, self.image_size), pair.caption
            except images.BadImage as error:
                logging.warning("skipped %s", error)
        raise UserError(f"none of the {len(self.pairs)} pictures can be read")

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = step * self.batch_size
        read = [self._read(self._index(first + i)) for i in range(self.batch_size)]
        dropped = np.random.default_rng([self.seed, 1, step]).random(self.batch_size) < self.dropout
        encoded = self.tokenizer.encode_batch([caption for _, caption in read], add_special_tokens=False)
        tokens = np.full((self.batch_size, self.length), self.end_token, np.int32)
        length = np.zeros(self.batch_size, np.int32)
        for row, (encoding, drop) in enumerate(zip(encoded, dropped, strict=True)):
            ids = (self.negative if drop else encoding.ids)[: self.length - 1]
            tokens[row, : len(ids)] = ids
            length[row] = len(ids)
        name = "image" if self.latents is None else "moments"
        return {name: np.stack([image for image, _ in read]), "tokens": tokens, "length": length}
