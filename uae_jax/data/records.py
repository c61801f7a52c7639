"""Where pictures (and their captions) lie: sources of records, read at random by number and decoded later.

folder        pictures below a folder; captions from its metadata.jsonl, as Hugging Face's imagefolder has them
jsonl         {"image": path, "caption": text}, a line each
array_record  shards that `python -m uae_jax.data prepare` has written
tfds          a dataset that TFDS has prepared as array_record; TensorFlow is not needed
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from uae_jax.data import images
from uae_jax.errors import UserError
from uae_jax.printable import printable

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MANIFEST = "manifest.json"


class Pair(NamedTuple):
    """One picture, or where it lies, with its caption ("" where there is none)."""

    image: Path | bytes | np.ndarray
    caption: str
    name: str


class Pairs(Protocol):
    """Records by number; what is wrong with one shows when it is read, as BadImage."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pair: ...


def picture(
    pair: Pair,
    size: int,
    how: str = "crop",
    limits: images.Limits = images.LIMITS,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """uint8 [size, size, 3]; see `images.fit`. Raises BadImage where the pair's picture cannot be read."""
    if isinstance(pair.image, np.ndarray):
        pixels = pair.image.repeat(3, axis=-1) if pair.image.shape[-1] == 1 else pair.image[..., :3]
        return images.fit(Image.fromarray(pixels), size, how, rng)
    return images.fit(images.load_image(pair.image, limits, pair.name), size, how, rng)


def _lines(path: Path) -> list[tuple[int, Any]]:
    """The objects of a jsonl file with the numbers of their lines; None where a line is no JSON object."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would part a string at U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.path: {path} cannot be read ({error}): name a jsonl file") from None
    found: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected a JSON object ({error})") from None
    return found


def _text(value: Any) -> str:
    """A caption that can be encoded. Raises TypeError, or UnicodeEncodeError of half a surrogate pair."""
    if not isinstance(value, str):
        raise TypeError("the caption is no string")
    value.encode()
    return value


def read_pairs(path: str | os.PathLike[str], image_key: str = "image", caption_key: str = "caption") -> list[Pair]:
    """The pairs of a jsonl file; a relative image path is relative to the file. Pictures are not opened.

    Raises:
      UserError: the file is missing or empty, or a line (named by its number) is no such object.
    """
    path = Path(path)
    pairs = []
    for number, values in _lines(path):
        try:
            image, caption = values[image_key], _text(values[caption_key])
            if not isinstance(image, str) or b"\0" in os.fsencode(image):
                raise TypeError("no path")
        except (KeyError, TypeError, UnicodeEncodeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"{image_key}": path, "{caption_key}": text}} '
                f"({type(error).__name__}: {printable(error)})"
            ) from None
        pairs.append(Pair(path.parent / image, caption, image))
    if not pairs:
        raise UserError(f"{path} holds no pairs")
    return pairs


def read_folder(path: str | os.PathLike[str], caption_key: str = "caption") -> list[Pair]:
    """The pictures below a folder, sorted by path, with the captions of its metadata.jsonl. None is opened.

    metadata.jsonl has an object a line: `file_name`, relative to it, and the caption under `caption_key` or `text`.
    With one, only the pictures it names are read.

    Raises:
      UserError: no such folder, no picture in it, or a line of the metadata (named by its number) that is no such
        object or names a file outside the folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        named = []
        for number, values in _lines(metadata):
            try:
                name = values["file_name"]
                caption = _text(values.get(caption_key, values.get("text", "")))
                if not isinstance(name, str) or b"\0" in os.fsencode(name):
                    raise TypeError("no file name")
            except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
                raise UserError(
                    f'{metadata}, line {number}: expected {{"file_name": name, "{caption_key}": text}} '
                    f"({printable(error)})"
                ) from None
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{metadata}, line {number}: {name!r} lies outside the folder")
            named.append(Pair(root / name, caption, name))
        if not named:
            raise UserError(f"{metadata} names no picture")
        return sorted(named, key=lambda pair: pair.name)
    seen = [p for p in root.rglob("*") if p.is_file()]
    files = sorted(p for p in seen if p.suffix.lower() in EXTENSIONS)
    if not files:
        raise UserError(f"no images in {root}: none of {len(seen)} files ends in {', '.join(EXTENSIONS)}")
    return [Pair(file, "", file.relative_to(root).as_posix()) for file in files]


def pack(name: str, caption: str, image: bytes) -> bytes:
    """A record of a shard: the length of a JSON header (4 bytes, little-endian), the header, the picture's file."""
    header = json.dumps({"name": name, "caption": caption}).encode()
    return len(header).to_bytes(4, "little") + header + image


def unpack(record: bytes) -> Pair:
    """The inverse of `pack`. Raises ValueError, LookupError or TypeError where it is no such record."""
    length = int.from_bytes(record[:4], "little")
    header = json.loads(record[4 : 4 + length])
    if not isinstance(header["name"], str):
        raise TypeError("the name is no string")
    return Pair(bytes(record[4 + length :]), _text(header["caption"]), header["name"])


class ArrayRecords:
    """The records of a folder that `prepare` has written.

    Attributes:
      manifest: what `prepare` has noted.

    Raises:
      UserError: it has no manifest (`prepare` has not finished), or a shard is missing or of another size.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        import grain

        root = Path(folder)
        try:
            self.manifest = json.loads((root / MANIFEST).read_text())
            shards = []
            for shard in self.manifest["shards"]:
                name, size, count, checksum = (shard[key] for key in ("file", "bytes", "records", "sha256"))
                if Path(name).name != name or "\0" in name or not isinstance(checksum, str):
                    raise ValueError("no such shard")
                shards.append((root / name, size, int(count)))
            counts = [count for _, _, count in shards]
            if min(counts, default=0) < 1 or sum(counts) != self.manifest["records"]:
                raise ValueError("the numbers of records do not add up")
            self.name = f"array_record {self.manifest['source']}"
        except FileNotFoundError:
            raise UserError(
                f"{root} has no {MANIFEST}: it is written last by python -m uae_jax.data prepare, which goes on where "
                "it was stopped"
            ) from None
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{root / MANIFEST} cannot be read ({printable(error)}): prepare the data again") from None
        for path, size, _ in shards:
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(
                    f"{printable(path)} is missing or not {size} bytes long: remove it and prepare the data again"
                )
        self._root = root
        # With the number of records none is opened before it is read.
        self._source = grain.sources.ArrayRecordDataSource([f"{path}[0:{count}]" for path, _, count in shards])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Pair:
        try:
            return unpack(self._source[index])
        except Exception as error:  # of a damaged shard: its reader's own kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise images.BadImage(f"{self._root}, record {index}", reason) from error


class TfdsPairs:
    """The pairs of a dataset that TFDS has prepared as array_record, read at random and without TensorFlow.

    Args:
      dataset: its folder DATASET/VERSION, or its name, "coco_captions" or "NAME/CONFIG:VERSION", in TFDS' data folder
        ($TFDS_DATA_DIR).
      split: of the dataset, in TFDS' syntax ("train[:90%]").
      image_key, caption_key: its features, "a/b" for one inside another; of several captions the first is taken; no
        `caption_key`: captions are empty.
      decoder: of the pictures: pillow (this package's, with its limits), or tfds (the dataset's own).

    Raises:
      UserError: there is no such dataset, split or feature, or it is not stored as array_record.
    """

    def __init__(
        self,
        dataset: str | os.PathLike[str],
        split: str,
        image_key: str,
        caption_key: str,
        decoder: str = "pillow",
    ):
        import tensorflow_datasets as tfds

        self.image_key, self.caption_key = image_key, caption_key
        try:
            if Path(dataset).is_dir():
                builder = tfds.builder_from_directory(os.fspath(dataset))
            else:
                builder = tfds.core.read_only_builder.builder_from_files(os.fspath(dataset))
            decoders: Any = None
            if decoder == "pillow":
                decoders = tfds.decode.SkipDecoding()
                for part in reversed(image_key.split("/")):
                    decoders = {part: decoders}
            self.source = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # of many kinds, most of them long
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"config.data.path: {dataset} is no dataset DATASET/VERSION that TFDS has prepared with "
                f"file_format='array_record', or has no split {split!r} ({reason})"
            ) from None
        if not len(self.source):
            raise UserError(f"config.data.split: {split!r} of {dataset} holds no examples")
        self.name = f"{builder.info.full_name} {split} {image_key} {dataset}"
        for key in (image_key, caption_key):
            self._check(builder.info.features, key)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        name = f"{self.name}, record {index}"
        try:
            example = self.source[index]
            image = self._feature(example, self.image_key)
            caption = self._feature(example, self.caption_key) if self.caption_key else ""
            if not isinstance(caption, str | bytes):
                caption = caption[0]
            caption = caption.decode() if isinstance(caption, bytes) else str(caption)
        except Exception as error:  # of a damaged shard or picture: of any kind
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise images.BadImage(name, reason) from error
        return Pair(image if isinstance(image, bytes) else np.asarray(image), caption, name)

    def _feature(self, example: Any, key: str) -> Any:
        for part in key.split("/"):
            example = example[part]
        return example

    def _check(self, features: Any, key: str) -> None:
        for part in key.split("/") if key else ():
            names = list(features.keys()) if hasattr(features, "keys") else []  # a FeaturesDict is no Mapping
            if part not in names:
                raise UserError(
                    f"config.data: the dataset has no feature {key!r}: there is {', '.join(names) or 'none inside'}"
                )
            features = features[part]


class Joined:
    """Several sources of records, one behind the other."""

    def __init__(self, parts: Sequence[Pairs]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        self.name = " + ".join(identity(part) for part in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number][index - (int(self._ends[number - 1]) if number else 0)]


def identity(source: Pairs) -> str:
    """What tells the pictures of one source from those of another: of files, path, size and time of change."""
    if hasattr(source, "name"):
        return source.name
    found = hashlib.sha256()
    for i in range(len(source)):
        path = source[i].image
        assert isinstance(path, Path)
        try:
            at = path.stat()
        except OSError:
            at = None
        found.update(json.dumps([str(path.resolve()), at and at.st_size, at and at.st_mtime_ns]).encode())
    return found.hexdigest()


def open_source(kind: str, path: str, settings: Any) -> Pairs:
    """The records of one source.

    Args:
      kind: folder, jsonl, array_record or tfds.
      path: of it; of tfds, a name too.
      settings: `config.data`: split, image_key, caption_key, decoder.

    Raises:
      UserError: see the sources.
    """
    if kind == "folder":
        return read_folder(path, settings.caption_key)
    if kind == "jsonl":
        return read_pairs(path, settings.image_key, settings.caption_key)
    if kind == "array_record":
        return ArrayRecords(path)
    return TfdsPairs(path, settings.split, settings.image_key, settings.caption_key, settings.decoder)


def open_all(settings: Any) -> tuple[list[Pairs], list[float]]:
    """The sources that `config.data` names, each with its weight: one, or the parts of its mixture."""
    if settings.source != "mixture":
        return [open_source(settings.source, settings.path, settings)], [1.0]
    parts = list(settings.mixture.values())
    return [open_source(p.source, p.path, settings) for p in parts], [float(p.weight) for p in parts]
