"""Pictures kept as the Gaussians that a VAE makes of them, so that a frozen encoder runs once and not at every step.

    FOLDER/KEY/00000.safetensors, ...   tensor `moments` [n, h, w, 2 c], in the VAE's compute type
    FOLDER/KEY/index.json               written last: number of pairs, rows a file, pictures that cannot be read

KEY is a hash of all that they depend on: the VAE's config.json and weights, the compute type, the size of the pictures,
and the pictures (of files: path, size and time of change).
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uae_jax import hosts, storage
from uae_jax.convert import files
from uae_jax.data.images import BadImage
from uae_jax.errors import UserError

ROWS = 1024  # pictures a file
_CHUNK = 2**24  # bytes of a weight file that are hashed at once

Encode = Callable[[np.ndarray], np.ndarray]  # uint8 [b, S, S, 3] -> moments [b, h, w, 2 c]


def key(vae: Path, dtype: str, image_size: int, source: str) -> str:
    """The hash, as hexadecimal digits.

    Args:
      vae: its folder.
      dtype: it computes in.
      source: `records.identity` of the pictures, and how they are fitted.
    """
    found = hashlib.sha256(json.dumps([dtype, image_size, source]).encode())
    for path in sorted(path for path in vae.iterdir() if path.suffix in (".json", ".safetensors")):
        found.update(path.name.encode())
        with open(path, "rb") as file:
            while part := file.read(_CHUNK):
                found.update(part)
    return found.hexdigest()[:32]


class Latents:
    """The Gaussians of a source's pictures, by their number.

    Raises:
      UserError: the folder's files are not those that its index names.
    """

    def __init__(self, folder: Path):
        index = json.loads((folder / "index.json").read_text())
        self.bad, self._rows, self._files = set(index["bad"]), index["rows"], []
        for i in range(-(-index["pairs"] // self._rows)):
            path = folder / f"{i:05}.safetensors"
            if not path.is_file():
                raise UserError(f"{path} is missing: remove {folder}, and the pictures are encoded again")
            self._files.append(files.map_tensors(files.read_header(path))["moments"])

    def __getitem__(self, index: int) -> np.ndarray:
        """[h, w, 2 c]. Raises BadImage where the picture could not be read."""
        if index in self.bad:
            raise BadImage(f"picture {index}", "could not be read when it was encoded")
        return self._files[index // self._rows][index % self._rows]


def _noted(path: Path, note: Path) -> list[int] | None:
    """The pictures of a complete file that cannot be read; None where the file has yet to be made."""
    return json.loads(note.read_text()) if path.is_file() and note.is_file() else None


def cached(
    folder: Path,
    count: int,
    picture: Callable[[int], np.ndarray],
    image_size: int,
    encode: Encode,
    batch: int,
    rows: int = ROWS,
) -> Latents:
    """The Gaussians of all pictures from `folder`, which is filled first where it has none.

    A run that is stopped meanwhile goes on behind the last complete file. Several processes encode together, the first
    writes.

    Args:
      folder: FOLDER/KEY.
      count: how many pictures there are.
      picture: one by its number, uint8 [S, S, 3], raising BadImage.
      image_size: S.
      encode: the VAE.
      batch: pictures that it is given at once.
      rows: pictures a file.

    Raises:
      UserError: the disk refuses.
    """
    if hosts.from_first((folder / "index.json").is_file):
        return Latents(folder)
    bad: list[int] = []
    for number, start in enumerate(range(0, count, rows)):
        path, note = folder / f"{number:05}.safetensors", folder / f"{number:05}.bad.json"
        kept = hosts.from_first(functools.partial(_noted, path, note))
        if kept is not None:
            bad += kept
            continue
        parts, missing = [], []
        for first in range(start, min(start + rows, count), batch):
            images = np.zeros((batch, image_size, image_size, 3), np.uint8)
            filled = min(batch, start + rows - first, count - first)
            for i in range(filled):
                try:
                    images[i] = picture(first + i)
                except BadImage:
                    missing.append(first + i)
            parts.append(encode(images)[:filled])
        moments = np.concatenate(parts)
        if hosts.first():
            storage.write_atomic(note, json.dumps(missing).encode())
            storage.write_atomic(path, files.one({"moments": moments}))
        bad += missing
    index = json.dumps({"pairs": count, "rows": rows, "bad": bad}).encode()
    hosts.on_first(lambda: storage.write_atomic(folder / "index.json", index))
    return Latents(folder)
