"""Captions as strings and as padded token ids."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer


def encode_captions(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, end_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the end token, padded: int32 [n, length] and their mask."""
    ids = np.full((len(texts), length), end_token, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, encoding in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
        tokens = [*encoding.ids, end_token]
        if len(tokens) > length:
            raise ValueError(f"caption of {len(tokens)} tokens, room for {length}: {texts[row]!r}")
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def decode_captions(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray) -> list[str]:
    """Strings of captions int [n, t] under their mask, without special tokens."""
    rows = zip(ids, mask, strict=True)
    return [tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in rows]


def retokenised(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray, end_token: int) -> np.ndarray:
    """bool [n]: the caption's text, read again, has other token ids than were sampled.

    The loop reads the sampled ids as they are; whoever is handed the text alone reads these. A policy can sample `re`
    `d` where the tokenizer would write `red`.

    Args:
      ids: int [n, t], `mask` bool [n, t].
    """
    content = [row[keep & (row != end_token)].tolist() for row, keep in zip(ids, mask, strict=True)]
    texts = tokenizer.decode_batch(content, skip_special_tokens=False)
    again = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.array([read.ids != sampled for read, sampled in zip(again, content, strict=True)])
