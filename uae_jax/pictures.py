"""Pictures to look at: contact sheets with captions, and PNG files."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uae_jax.printable import printable
from uae_jax.storage import write_atomic

_FONT, _LINE, _PAD = 13, 17, 6  # text height, line height, margin: pixels
_NARROWEST = 120  # of a column, so that a caption under a tiny picture keeps some words a line
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def to_uint8(picture: Any) -> np.ndarray:
    """[H, W, 3], uint8 or floating in 0..1 (clipped; NaN is black) -> uint8 [H, W, 3]. ValueError for anything else."""
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(f"a picture is [H, W, 3], not {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind in "iub":
        raise ValueError(f"a picture is uint8 or floating in 0..1, not {array.dtype}")
    values = np.nan_to_num(array.astype(np.float32), nan=0.0)
    return np.round(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Breaks `text` at spaces, and inside a word that is wider than `width` pixels, into lines that fit."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in printable(paragraph).split():
            candidate = f"{line} {word}" if line else word
            if font.getlength(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = ""
            for character in word:
                if line and font.getlength(line + character) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines.append(line)
    return lines if text.strip() else []


def grid(rows: list[list[Any]], captions: list[list[str]], headers: list[str], scale: int) -> np.ndarray:
    """A contact sheet: one column a header, each picture with its caption under it.

    Args:
      rows: pictures [H, W, 3], uint8 or floating in 0..1, of any sizes; None leaves a place empty. Every row has as
        many places as there are headers.
      captions: a text for each place, wrapped to the column; '' for none.
      headers: a title for each column.
      scale: enlargement in whole pixels (nearest neighbour).

    Returns:
      uint8 [height, width, 3].
    """
    for name, table in (("rows", rows), ("captions", captions)):
        if any(len(line) != len(headers) for line in table) or len(table) != len(rows):
            raise ValueError(f"grid: {name} must be {len(rows)} x {len(headers)}")
    enlarged = [
        [None if cell is None else to_uint8(cell).repeat(scale, axis=0).repeat(scale, axis=1) for cell in row]
        for row in rows
    ]
    font = ImageFont.load_default(size=_FONT)
    widths = [
        max([_NARROWEST, *(cell.shape[1] for cell in column if cell is not None)])
        for column in ([row[i] for row in enlarged] for i in range(len(headers)))
    ]
    titles = [wrap(title, font, width) for title, width in zip(headers, widths, strict=True)]
    texts = [[wrap(text, font, width) for text, width in zip(line, widths, strict=True)] for line in captions]
    top = _PAD + _LINE * max(map(len, titles), default=0) + _PAD
    pictures = [max((cell.shape[0] for cell in row if cell is not None), default=0) for row in enlarged]
    heights = [tall + _PAD + _LINE * max(map(len, line)) + _PAD for tall, line in zip(pictures, texts, strict=True)]

    sheet = Image.new("RGB", (_PAD + sum(width + _PAD for width in widths), top + sum(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(lines: list[str], x: int, y: int) -> None:
        for i, line in enumerate(lines):
            draw.text((x, y + i * _LINE), line, fill=_INK, font=font)

    x = _PAD
    for column, width in enumerate(widths):
        write(titles[column], x, _PAD)
        y = top
        for row, line, tall, height in zip(enlarged, texts, pictures, heights, strict=True):
            cell = row[column]
            if cell is not None:
                sheet.paste(Image.fromarray(cell), (x, y))
            write(line[column], x, y + tall + _PAD // 2)
            y += height
        x += width + _PAD
    return np.asarray(sheet)


def encode_png(array: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes [H, W, 3], uint8 or floating in 0..1, as a whole; parents are made. UserError where the disk refuses."""
    write_atomic(path, encode_png(array))
