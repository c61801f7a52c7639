"""Turns pictures into array_record shards, which one machine or many read at random without a million small files.

OUT/data-00000-of-00007.array_record, ...   records as `records.pack` has them: name, caption, the picture's file
OUT/data-00000-of-00007.json                written after its shard: bytes, sha256, records, what was skipped
OUT/manifest.json                           written last: the source, the shards, all that was skipped
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from uae_jax import storage
from uae_jax.data import images, records
from uae_jax.errors import UserError

ROWS = 1024  # records a shard
_CHUNK = 2**24


def prepare(
    source: records.Pairs,
    out: Path,
    rows: int = ROWS,
    limits: images.Limits = images.LIMITS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the records of `source` to `out`; stopped at any point, the same call goes on behind the last shard.

    Each picture is decoded once: one that is broken or above the limits is left out, and named in the manifest.

    Returns:
      The manifest.

    Raises:
      UserError: `out` has been begun from another source or with another `rows`; nothing is usable; the disk refuses.
    """
    if rows < 1:
        raise UserError(f"--rows={rows}: must be at least 1")
    count = -(-len(source) // rows)
    made = hashlib.sha256(json.dumps([_listing(source), len(source), rows, *limits]).encode()).hexdigest()
    plan = {"source": made, "records": len(source), "rows": rows}
    begun = out / "plan.json"
    with storage.storage_errors(out):
        if begun.exists() and begun.read_bytes() != json.dumps(plan).encode():
            raise UserError(f"{out} was begun from other pictures or with other options: choose another --out")
        if not begun.exists() and out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty: choose another --out")
    storage.write_atomic(begun, json.dumps(plan).encode())
    shards = []
    for number in range(count):
        path = out / f"data-{number:05}-of-{count:05}.array_record"
        shard = _complete(path)
        if shard is None:
            shard = _write(source, range(number * rows, min((number + 1) * rows, len(source))), path, limits)
            say(f"{path.name}: {shard['records']} records, {len(shard['skipped'])} skipped")
        shards.append(shard)
    skipped = [bad for shard in shards for bad in shard["skipped"]]
    total = sum(shard["records"] for shard in shards)
    if not total:
        raise UserError(f"none of the {len(source)} pictures is usable: {'; '.join(map(str, skipped[:5]))}")
    kept = [{k: v for k, v in shard.items() if k != "skipped"} for shard in shards if shard["records"]]
    manifest = plan | {"records": total, "shards": kept, "skipped": skipped}
    for path in out.glob(".*.tmp"):  # of runs that were killed
        path.unlink(missing_ok=True)
    storage.write_atomic(out / records.MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    say(f"{out}: {total} records in {len(kept)} shards, {len(skipped)} skipped")
    return manifest


def verify(folder: Path) -> int:
    """Reads every shard against the manifest's checksums: the number of records. Raises UserError for the first bad."""
    found = records.ArrayRecords(folder)
    for shard in found.manifest["shards"]:
        path = folder / shard["file"]
        if _sha256(path) != shard["sha256"]:
            raise UserError(f"{path} has been changed: it lacks the manifest's checksum; remove it and prepare again")
    return len(found)


def _listing(source: records.Pairs) -> str:
    """A hash of what is to be written: pictures by `records.identity`, and the captions of files."""
    found = hashlib.sha256(records.identity(source).encode())
    if isinstance(source, list):
        found.update(json.dumps([[pair.name, pair.caption] for pair in source]).encode())
    return found.hexdigest()


def _complete(path: Path) -> dict[str, Any] | None:
    """What the note beside a shard says, where the shard is as the note has it."""
    note = path.with_suffix(".json")
    try:
        shard = json.loads(note.read_text())
        if shard["records"] and (path.stat().st_size != shard["bytes"] or _sha256(path) != shard["sha256"]):
            return None
        return shard if shard["file"] == path.name and isinstance(shard["skipped"], list) else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or not as it was written
        return None


def _write(source: records.Pairs, indices: range, path: Path, limits: images.Limits) -> dict[str, Any]:
    """Writes one shard, whole or not at all, and then its note."""
    partial = path.with_name(f".{path.name}.tmp")
    skipped, count = [], 0
    with storage.storage_errors(path):
        writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
        for index in indices:
            try:
                pair = source[index]
                content = _content(pair, limits)
            except images.BadImage as error:
                skipped.append({"name": error.path, "reason": error.reason})
                continue
            writer.write(records.pack(pair.name, pair.caption, content))
            count += 1
        writer.close()
        size, checksum = partial.stat().st_size, _sha256(partial)
        if count:
            os.replace(partial, path)
        else:
            partial.unlink()
    shard = {"file": path.name, "bytes": size, "sha256": checksum, "records": count, "skipped": skipped}
    storage.write_atomic(path.with_suffix(".json"), json.dumps(shard).encode())
    return shard


def _content(pair: records.Pair, limits: images.Limits) -> bytes:
    """The picture's file, which has been decoded once to see that it can be."""
    if isinstance(pair.image, np.ndarray):
        out = io.BytesIO()
        Image.fromarray(pair.image.squeeze()).save(out, "PNG")
        return out.getvalue()
    images.load_image(pair.image, limits, pair.name)
    return pair.image if isinstance(pair.image, bytes) else pair.image.read_bytes()


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            found.update(part)
    return found.hexdigest()
