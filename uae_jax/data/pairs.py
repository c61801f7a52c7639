"""Batches of pictures with captions, by (seed, step)."""

from typing import Any

import numpy as np
from tokenizers import Tokenizer

from uae_jax.data.order import Bad, Order, Rows, Tally, first_usable
from uae_jax.data.sources import Pictures


class PairBatches:
    """Batch `step` is a pure function of (seed, step); each epoch is another order of all pairs, without a gap.

    Items: {"image": uint8 [b, S, S, 3], "tokens": int32 [b, t], "length": int32 [b] without the end token}; with
    `latents` "moments" [b, h, w, 2 c] in place of the images. A picture that cannot be read is replaced by the next
    that can, caption included.

    Attributes:
      source: the pictures, with their records.
      order: in which they are read.
      batch_size: b, over all processes.
      tally: counts the bad records of what `sources.prefetch` reads.
      latents: the pictures' Gaussians by number, raising BadImage as a picture does (`data.latents`); None: images.
      length: t; longer captions are cut, so that they end with the end token.
      dropout: share of captions that are replaced by `negative`, the unconditional branch of guidance.
    """

    def __init__(
        self,
        source: Pictures,
        order: Order,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        length: int,
        end_token: int,
        dropout: float,
        negative: tuple[int, ...],
        seed: int,
        latents: Any = None,
        tally: Tally | None = None,
    ):
        self.latents, self.tally = latents, tally
        self.source, self.order, self.tokenizer, self.batch_size = source, order, tokenizer, batch_size
        self.length, self.end_token, self.dropout, self.negative, self.seed = length, end_token, dropout, negative, seed

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.read(step)[0]

    def read(self, step: int, rows: Rows | None = None) -> tuple[dict[str, np.ndarray], list[Bad]]:
        """The batch of a step, or these rows of it and no others, and the records that had to be skipped for them."""
        read, bad = [], []
        wanted = list(range(self.batch_size) if rows is None else rows)
        for row in wanted:
            position = step * self.batch_size + int(row)

            def attempt(index: int, position: int = position) -> tuple[np.ndarray, str]:
                pair = self.source.pairs[index]
                if self.latents is not None:
                    return self.latents[index], pair.caption
                return self.source.picture(index, position), pair.caption

            found, skipped = first_usable(self.order, position, attempt)
            read.append(found)
            bad += skipped
        dropped = np.random.default_rng([self.seed, 1, step]).random(self.batch_size) < self.dropout
        encoded = self.tokenizer.encode_batch([caption for _, caption in read], add_special_tokens=False)
        tokens = np.full((len(read), self.length), self.end_token, np.int32)
        length = np.zeros(len(read), np.int32)
        for row, (encoding, drop) in enumerate(zip(encoded, dropped[wanted], strict=True)):
            ids = (self.negative if drop else encoding.ids)[: self.length - 1]
            tokens[row, : len(ids)] = ids
            length[row] = len(ids)
        name = "image" if self.latents is None else "moments"
        batch = {name: np.stack([image for image, _ in read]), "tokens": tokens, "length": length}
        return batch, bad
