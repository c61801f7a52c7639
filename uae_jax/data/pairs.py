"""Pictures with captions from a jsonl file of {"image": path, "caption": text}; batches by (seed, step)."""

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from uae_jax.data import images
from uae_jax.errors import UserError


class Pair(NamedTuple):
    """One line of the file."""

    image: Path
    caption: str


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


class PairBatches:
    """Batch `step` is a pure function of (seed, step); each epoch is another order of all pairs, without a gap.

    Items: {"image": uint8 [b, S, S, 3], "tokens": int32 [b, t], "length": int32 [b] without the end token}. A picture
    that cannot be read is replaced by the next that can, caption included, with a warning.

    Attributes:
      pairs: from `read_pairs`.
      length: t; longer captions are cut, so that they end with the end token.
      dropout: share of captions that are replaced by `negative`, the unconditional branch of guidance.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tokenizer: Tokenizer,
        *,
        image_size: int,
        batch_size: int,
        length: int,
        end_token: int,
        dropout: float,
        negative: tuple[int, ...],
        seed: int,
    ):
        self.pairs, self.tokenizer, self.image_size, self.batch_size = pairs, tokenizer, image_size, batch_size
        self.length, self.end_token, self.dropout, self.negative, self.seed = length, end_token, dropout, negative, seed

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pairs))
        return int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pairs))[place])

    def _read(self, index: int) -> tuple[np.ndarray, str]:
        for offset in range(len(self.pairs)):
            pair = self.pairs[(index + offset) % len(self.pairs)]
            try:
                return images.fit(images.load_image(pair.image), self.image_size), pair.caption
            except images.BadImage as error:
                logging.warning("skipped %s", error)
        raise UserError(f"none of the {len(self.pairs)} pictures can be read; the first is {self.pairs[0].image}")

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
        return {"image": np.stack([image for image, _ in read]), "tokens": tokens, "length": length}
