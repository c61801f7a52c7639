"""Pictures kept as the Gaussians that a VAE makes of them, so that a frozen encoder runs once and not at every step.

    FOLDER/KEY/00000.safetensors, ...   tensor `moments` [n, h, w, 2 c], in the VAE's compute type
    FOLDER/KEY/index.json               written last: number of pairs, rows a file, pictures that cannot be read

KEY is a hash of all that they depend on: the VAE's config.json and weights, the compute type, the size of the pictures,
and the pictures (of files: path, size and time of change).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uae_jax import storage
from uae_jax.convert import files
from uae_jax.data import pairs
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
      source: `identity` of the pictures.
    """
    found = hashlib.sha256(json.dumps([dtype, image_size, source]).encode())
    for path in sorted(path for path in vae.iterdir() if path.suffix in (".json", ".safetensors")):
        found.update(path.name.encode())
        with open(path, "rb") as file:
            while part := file.read(_CHUNK):
                found.update(part)
    return found.hexdigest()[:32]


def identity(source: pairs.Pairs) -> str:
    """What tells the pictures of one source from those of another."""
    if isinstance(source, pairs.TfdsPairs):
        return source.name
    found = hashlib.sha256()
    for i in range(len(source)):
        path = source[i].image
        assert isinstance(path, Path)
        at = path.stat() if path.is_file() else None
        found.update(json.dumps([str(path.resolve()), at and at.st_size, at and at.st_mtime_ns]).encode())
    return found.hexdigest()


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


def cached(folder: Path, source: pairs.Pairs, image_size: int, encode: Encode, batch: int, rows: int = ROWS) -> Latents:
    """The Gaussians of all pictures of `source` from `folder`, which is filled first where it has none.

    A run that is stopped meanwhile goes on behind the last complete file.

    Args:
      folder: FOLDER/KEY.
      image_size: the pictures are fitted to this.
      encode: the VAE.
      batch: pictures that it is given at once.
      rows: pictures a file.

    Raises:
      UserError: the disk refuses.
    """
    if (folder / "index.json").is_file():
        return Latents(folder)
    bad: list[int] = []
    for number, start in enumerate(range(0, len(source), rows)):
        path, note = folder / f"{number:05}.safetensors", folder / f"{number:05}.bad.json"
        if path.is_file() and note.is_file():
            bad += json.loads(note.read_text())
            continue
        parts, missing = [], []
        for first in range(start, min(start + rows, len(source)), batch):
            images = np.zeros((batch, image_size, image_size, 3), np.uint8)
            count = min(batch, start + rows - first, len(source) - first)
            for i in range(count):
                try:
                    images[i] = pairs.picture(source[first + i], image_size)
                except BadImage:
                    missing.append(first + i)
            parts.append(encode(images)[:count])
        moments = np.concatenate(parts)
        storage.write_atomic(note, json.dumps(missing).encode())
        storage.write_atomic(path, files.one({"moments": moments}))
        bad += missing
    storage.write_atomic(folder / "index.json", json.dumps({"pairs": len(source), "rows": rows, "bad": bad}).encode())
    return Latents(folder)
