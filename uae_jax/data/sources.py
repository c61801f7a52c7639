"""Random-access sources of images, and batches as a pure function of (seed, step)."""

import collections
import concurrent.futures
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from uae_jax.data import images, records
from uae_jax.data.order import Bad, Order, Rows, Tally, first_usable
from uae_jax.data.shapes import render, scene
from uae_jax.errors import UserError

KEEP_BYTES = 2 << 30
AHEAD = 2  # batches
THREADS = min(8, os.cpu_count() or 1)  # that decode the pictures of a batch


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


class Pictures:
    """The pictures of a source of records as squares, decoded when they are read.

    They stay in memory if all of them take less than 2 GiB and are cropped alike each time.

    Args:
      pairs: the records.
      size: pixels a side.
      how: see `images.fit`.
      limits: of the files.
      seed: of random crops.
    """

    def __init__(
        self,
        pairs: records.Pairs,
        size: int,
        how: str = "crop",
        limits: images.Limits = images.LIMITS,
        seed: int = 0,
    ):
        self.pairs, self._size, self._how, self._limits, self._seed = pairs, size, how, limits, seed
        self._keep = how != "random_crop" and len(pairs) * size * size * 3 < KEEP_BYTES
        self._kept: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_keep": False, "_kept": {}}  # each worker process would hold a copy

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"image": uint8 [S, S, 3]}, random crops at the centre. Raises BadImage where it cannot be read."""
        return {"image": self.picture(index)}

    def picture(self, index: int, position: int | None = None) -> np.ndarray:
        """uint8 [S, S, 3]; `position` among all that are ever read decides a random crop."""
        if not 0 <= index < len(self.pairs):
            raise IndexError(f"index {index} outside 0..{len(self.pairs) - 1}")
        if (kept := self._kept.get(index)) is not None:
            return kept
        rng = None if position is None else np.random.default_rng([self._seed, 2, position])
        image = records.picture(self.pairs[index], self._size, self._how, self._limits, rng)
        if self._keep:
            self._kept[index] = image
        return image


def open_pictures(config: Any) -> tuple[Pictures, list[list[int]], list[float], Tally]:
    """What `config.data` names: the pictures, their indices part by part, the parts' weights, and a count of bad ones.

    Raises:
      UserError: see `records.open_source`.
    """
    data = config.data
    parts, weights = records.open_all(data)
    pairs = parts[0] if len(parts) == 1 else records.Joined(parts)
    limits = images.Limits(data.max_bytes, data.max_pixels)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    groups = [list(range(first, last)) for first, last in itertools.pairwise(ends)]
    pictures = Pictures(pairs, data.image_size, data.fit, limits, config.seed)
    return pictures, groups, weights, Tally(len(pairs), data.max_bad_fraction)


def split(source: Sequence[Any] | Source, held_out: int) -> tuple[list[int], list[int]]:
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
    """Endless batches, `batches[step]` a pure function of (seed, step); rows are records in the order of `order`.

    Items: {"image": uint8 [b, S, S, 3], "index": int32 [b]}, the latter being positions in `source`. A picture that
    cannot be read is replaced by the next in its group that can.

    Args:
      source: of the images.
      order: in which they are read.
      batch_size: b, over all processes.
      tally: counts the bad ones of what `prefetch` reads.

    Raises:
      UserError: the batch is empty.
    """

    def __init__(self, source: Source, order: Order, batch_size: int, tally: Tally | None = None):
        if batch_size < 1:
            raise UserError(f"cannot make batches of {batch_size}")
        self._source, self._order, self.batch_size, self.tally = source, order, batch_size, tally

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.read(step)[0]

    def read(self, step: int, rows: Rows | None = None) -> tuple[dict[str, np.ndarray], list[Bad]]:
        """The batch of a step, or these rows of it and no others, and the records that had to be skipped for them."""

        def row(number: int) -> tuple[tuple[np.ndarray, int], list[Bad]]:
            position = step * self.batch_size + int(number)

            def image(index: int) -> tuple[np.ndarray, int]:
                if isinstance(self._source, Pictures):
                    return self._source.picture(index, position), index
                return self._source[index]["image"], index

            return first_usable(self._order, position, image)

        wanted = range(self.batch_size) if rows is None else rows
        if isinstance(self._source, Pictures):  # decoders let other threads run
            with concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch") as pool:
                found = list(pool.map(row, wanted))
        else:
            found = [row(number) for number in wanted]
        batch = {
            "image": np.stack([image for (image, _), _ in found]),
            "index": np.array([index for (_, index), _ in found], np.int32),
        }
        return batch, [bad for _, skipped in found for bad in skipped]


def batches(source: Source, indices: Sequence[int], batch_size: int, seed: int) -> Batches:
    """`Batches` of the images at `indices`: each epoch is shuffled differently and covers every index once.

    Epochs follow each other without a gap, so batches are always full, even when there are fewer indices than a batch
    holds. Raises UserError where there are no indices, or the batch is empty.
    """
    return Batches(source, Order([indices], [1.0], seed), batch_size)


def prefetch(
    ds: Any,
    start: int,
    stop: int,
    workers: int = 0,
    place: Callable[[dict[str, Any]], dict[str, Any]] = lambda x: x,
    rows: Rows | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the batches of steps `start` to `stop - 1`, read by a thread that stays 2 batches ahead.

    An error while reading is raised at its step. Closing the generator, or an error, ends the thread and the workers.

    Args:
      ds: batches by step (`stages.Batches`); what they skip is counted.
      workers: processes that read and decode in its place, whole batches in turn; 0: none.
      place: what the thread does to each batch: puts it on the devices.
      rows: of each batch that are read: a process's part; None: all.

    Raises:
      UserError: more records are bad than the tally allows.
    """
    if start >= stop:
        return
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads some of its own there
            flags.FLAGS.mark_as_parsed()
        steps = grain.MapDataset.range(start, stop).map(functools.partial(ds.read, rows=rows))
        dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        ready = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))

        def read(step: int) -> tuple[dict[str, Any], list[Bad]]:
            batch, bad = next(ready)
            return place(batch), bad
    else:

        def read(step: int) -> tuple[dict[str, Any], list[Bad]]:
            batch, bad = ds.read(step, rows)
            return place(batch), bad

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    pending = collections.deque(pool.submit(read, step) for step in range(start, min(start + AHEAD, stop)))
    try:
        for step in range(start, stop):
            batch, bad = pending.popleft().result()
            if ds.tally is not None:
                ds.tally.add(bad)
            if step + AHEAD < stop:
                pending.append(pool.submit(read, step + AHEAD))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if workers:
            ready.close()
