"""Random-access sources of images, and batches as a pure function of (seed, step)."""

import collections
import concurrent.futures
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from uae_jax.data import images
from uae_jax.data.shapes import render, scene
from uae_jax.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
KEEP_BYTES = 2 << 30
AHEAD = 2  # batches


class Source(Protocol):
    """What grain calls a random-access data source; items hold at least {"image": uint8 [S, S, 3]}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ShapesSource:
    """Scenes 0..size-1 of the stream `seed` (see `scene.split_seed` for disjoint splits)."""

    def __init__(self, seed: int, size: int, image_size: int = 48, max_objects: int = scene.MAX_OBJECTS):
        self._seed, self._size, self._image_size, self._max_objects = seed, size, image_size, max_objects

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [S, S, 3], "scene": Scene}."""
        if not 0 <= index < self._size:
            raise IndexError(f"index {index} outside 0..{self._size - 1}")
        drawn = scene.sample_scene(self._seed, int(index), self._max_objects)
        return {"image": render.render(drawn, self._image_size), "scene": drawn}


class FolderSource:
    """The images below a folder, sorted by path, each decoded once at construction.

    Broken ones are skipped, with a warning each. The fitted arrays stay in memory if they take less than 2 GiB;
    otherwise files are decoded again at each access.

    Attributes:
      paths: the usable files, item by item.
      skipped: {path: reason} of the others.

    Raises:
      UserError: no such folder, no image files in it, or none that is usable.
    """

    def __init__(self, path: str | os.PathLike[str], image_size: int):
        root = pathlib.Path(path)
        if not root.is_dir():
            raise UserError(f"{root} is not a folder")
        seen = [p for p in root.rglob("*") if p.is_file()]
        files = sorted(p for p in seen if p.suffix.lower() in EXTENSIONS)
        if not files:
            raise UserError(f"no images in {root}: none of {len(seen)} files ends in {', '.join(EXTENSIONS)}")
        self._image_size = image_size
        keep = len(files) * image_size * image_size * 3 < KEEP_BYTES
        self.paths: list[pathlib.Path] = []
        self.skipped: dict[pathlib.Path, str] = {}
        self._arrays: list[np.ndarray] = []

        def attempt(file: pathlib.Path) -> np.ndarray | images.BadImage:
            try:
                return self._decode(file)
            except images.BadImage as error:
                return error

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for file, result in zip(files, pool.map(attempt, files), strict=True):
                if isinstance(result, images.BadImage):
                    logging.warning("skipped %s", result)
                    self.skipped[file] = result.reason
                else:
                    self.paths.append(file)
                    if keep:
                        self._arrays.append(result)
        if not self.paths:
            reasons = [f"{file.name} ({reason})" for file, reason in self.skipped.items()]
            more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            raise UserError(f"none of the {len(files)} images in {root} is usable: {'; '.join(reasons[:5])}{more}")
        if self.skipped:
            logging.warning("%s: %d of %d images skipped", root, len(self.skipped), len(files))

    def _decode(self, file: pathlib.Path) -> np.ndarray:
        return images.fit(images.load_image(file), self._image_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [S, S, 3], "path": Path}. Raises BadImage if a file has changed and no longer decodes."""
        if not 0 <= index < len(self.paths):
            raise IndexError(f"index {index} outside 0..{len(self.paths) - 1}")
        path = self.paths[index]
        return {"image": self._arrays[index] if self._arrays else self._decode(path), "path": path}


def split(source: Source, held_out: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out, disjoint when there are at least 4 images.

    Every k-th image is held out, `held_out` in all but at most a quarter (and at least one). With fewer than 4 images
    all of them serve as both, with a warning.
    """
    if held_out < 1:
        raise UserError(f"held_out must be at least 1, not {held_out}")
    n = len(source)
    if n < 4:
        logging.warning("only %d images: all serve for training and as held-out ones", n)
        return list(range(n)), list(range(n))
    count = min(held_out, n // 4)
    held = [(n // count) * (i + 1) - 1 for i in range(count)]
    return sorted(set(range(n)) - set(held)), held


class Batches:
    """Endless batches: the one of a step is a pure function of (seed, step).

    Each epoch is shuffled differently and covers every index once; epochs follow each other without a gap, so batches
    are always full, even when there are fewer indices than a batch holds.

    Items: {"image": uint8 [b, S, S, 3], "index": int32 [b]}, the latter being positions in `source`.

    Attributes:
      batch_size: b, over all processes.

    Raises:
      UserError: there are no indices, or the batch is empty.
    """

    def __init__(self, source: Source, indices: Sequence[int], batch_size: int, seed: int):
        if not len(indices) or batch_size < 1:
            raise UserError(f"cannot make batches of {batch_size} from {len(indices)} images")
        positions = np.asarray(indices, np.int32)

        def read(i: int) -> dict[str, np.ndarray]:
            return {"image": source[int(positions[i])]["image"], "index": positions[i]}

        # grain shuffles epoch e with seed + e: mixing the seed first keeps run 1 from being run 0 an epoch later.
        mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.batch_size = batch_size
        self._examples = grain.MapDataset.range(len(positions)).shuffle(seed=mixed).repeat().map(read)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.part(step, np.arange(self.batch_size))

    def part(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some rows of `self[step]`; no others are read."""
        examples = [self._examples[step * self.batch_size + int(row)] for row in rows]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def prefetch(read: Callable[[int], dict[str, np.ndarray]], start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields read(start), ..., read(stop - 1), read by a thread that stays 2 batches ahead.

    An error while reading is raised at its step. Closing the generator, or an error, ends the thread.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending = collections.deque(pool.submit(read, step) for step in range(start, min(start + AHEAD, stop)))
    try:
        for step in range(start, stop):
            batch = pending.popleft().result()
            if step + AHEAD < stop:
                pending.append(pool.submit(read, step + AHEAD))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
