"""What a checkpoint says of itself, in its record.json: its configuration, and size and checksum of each of its files.

The record is written before the checkpoint takes its name, so that there is none without; it has a checksum itself.
"""

import concurrent.futures
import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from uae_jax.errors import UserError

RECORD = "record.json"
FORMAT = 1  # of what a checkpoint holds; a higher one is refused
_BLOCK = 1 << 22  # bytes read at once
_THREADS = 4  # zlib leaves the interpreter free


class Damaged(Exception):
    """A checkpoint is not what was written; the reason, to follow 'is damaged: '."""


class Record(NamedTuple):
    """What was known when a checkpoint was written."""

    config: dict[str, Any]  # nested JSON values; empty where the run had none
    metric: float | None  # of `config.checkpoint.best`, higher is better; None: not measured, or not finite
    files: dict[str, tuple[int, int]]  # path below the folder -> (bytes, CRC-32)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name != RECORD:
            yield path


def _sum(path: epath.Path) -> tuple[int, int]:
    size = value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, value = size + len(block), zlib.crc32(block, value)
    return size, value


def _sealed(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def write(folder: epath.Path, config: Mapping[str, Any], metric: float | None) -> None:
    """Reads every file of a checkpoint that is complete but for its name, and writes its record."""
    paths = sorted(_files(folder), key=str)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(_sum, paths), strict=True))
    values = {"format": FORMAT, "config": config, "metric": metric, "files": found}
    values = json.loads(json.dumps(values))  # a tuple equals a list
    (folder / RECORD).write_text(json.dumps({"crc32": _sealed(values), **values}, indent=1) + "\n")


def read(folder: epath.Path) -> Record | None:
    """The record of a checkpoint; None where an older version wrote none.

    Raises:
      Damaged: it is not what was written.
      UserError: a newer version wrote it.
    """
    if not folder.is_dir():
        raise Damaged(f"{folder.name}/ is missing")
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_bytes())
        seal, version = values.pop("crc32"), values["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{RECORD} cannot be read") from None
    if seal != _sealed(values):
        raise Damaged(f"{RECORD} has another checksum")
    if version > FORMAT:
        raise UserError(
            f"{path}: a newer version of uae_jax wrote this checkpoint (format {version}, here {FORMAT}): update it"
        )
    return Record(values["config"], values["metric"], {name: tuple(at) for name, at in values["files"].items()})


def verify(folder: epath.Path, record: Record) -> None:
    """Reads every file. Raises Damaged naming the first that is missing or not what was written."""

    def check(name: str) -> str | None:
        size, value = record.files[name]
        try:
            found = _sum(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        if found[0] != size:
            return f"{name} has {found[0]} bytes instead of {size}"
        return None if found[1] == value else f"{name} has another checksum"

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for problem in pool.map(check, record.files):
            if problem:
                raise Damaged(problem)
