"""Safetensors files of a model folder: headers first, data mapped into memory, written as a stream. Never pickle."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from uae_jax.errors import UserError

# transformers' and diffusers' name of the weights, before ".safetensors" and ".safetensors.index.json".
STEMS = ("model", "diffusion_pytorch_model")
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # as transformers' save_pretrained
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class Header(NamedTuple):
    """Where a tensor lies: its file, safetensors' code of its type, its shape, its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Spec(NamedTuple):
    """What is to be written of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Headers(NamedTuple):
    """What the files of a folder hold, unread."""

    stem: str  # one of STEMS
    tensors: dict[str, Header]
    problems: list[str]  # between index and files, in words


def read_headers(folder: Path) -> Headers:
    """The headers of all tensors of a folder.

    Raises:
      UserError: no safetensors, a shard that is missing, a damaged file.
    """
    for stem in STEMS:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            return Headers(stem, read_header(single), [])
        if index.is_file():
            return Headers(stem, *_read_shards(folder, index))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        suffix = Path(pickles[0]).suffix
        # Tensors that share memory are refused by safetensors: they are cloned.
        command = (
            "import glob, torch; from safetensors.torch import save_file; x = {}; "
            f"[x.update(torch.load(f, 'cpu', weights_only=True)) for f in glob.glob('{folder}/*{suffix}')]; "
            "save_file({k: v.contiguous().clone() for k, v in x.items()}, "
            f"'{folder}/model.safetensors', {{'format': 'pt'}})"
        )
        raise UserError(
            f"{folder} holds its weights as pickles only ({', '.join(pickles[:3])}), which are never read: "
            f'where torch is installed, run python -c "{command}"'
        )
    raise UserError(f"{folder / 'model.safetensors'} is missing, and model.safetensors.index.json too")


def _read_shards(folder: Path, index: Path) -> tuple[dict[str, Header], list[str]]:
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors: copy it again") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} missing, though {index.name} names it: download it again")
    headers: dict[str, Header] = {}
    problems = []
    for shard in shards:
        for name, header in read_header(folder / shard).items():
            if name in headers:
                problems.append(f"twice: {name}, in {headers[name].path.name} and {shard}")
            elif name in places and places[name] != shard:
                problems.append(f"misplaced: {name} is in {shard}, the index says {places[name]}")
            headers[name] = header
    problems += [
        f"not in the index: {name}, in {header.path.name}" for name, header in headers.items() if name not in places
    ]
    problems += [f"missing: {name}, in {shard} by the index" for name, shard in places.items() if name not in headers]
    return headers, problems


def read_header(path: Path) -> dict[str, Header]:
    """The tensors of one file, in the order of their data.

    Raises:
      UserError: the file is truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):  # checks the header, and that it covers the whole file
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            values = json.loads(file.read(size))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or truncated ({error}): copy it again") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    values.pop("__metadata__", None)
    headers = {
        name: Header(path, x["dtype"], tuple(x["shape"]), *(8 + size + at for at in x["data_offsets"]))
        for name, x in values.items()
    }
    return dict(sorted(headers.items(), key=lambda item: item[1].begin))


def map_tensors(headers: Mapping[str, Header]) -> dict[str, np.ndarray]:
    """Read-only views of the files: a slice, transposed or not, reads just its own bytes, when it is used."""
    files: dict[Path, np.ndarray] = {}
    for header in headers.values():
        if header.path not in files:
            files[header.path] = np.asarray(np.memmap(header.path, np.uint8, "r"))
    return {name: files[x.path][x.begin : x.end].view(DTYPES[x.dtype]).reshape(x.shape) for name, x in headers.items()}


def write(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes tensors as they come, in the order of `specs`, into files of at most `shard_bytes` (or one tensor).

    One file is named STEM.safetensors; several are numbered and get an index, as transformers does it. `metadata` is
    noted in the header of each, beside the format.

    Returns:
      The names of the files.
    """
    shards = _split(specs, shard_bytes)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    source = iter(tensors)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(_header({name: specs[name] for name in shard}, metadata or {}))
            for name in shard:
                given, x = next(source)
                if (given, x.dtype, x.shape) != (name, *specs[name]):
                    raise ValueError(f"{given} {x.dtype}{x.shape} comes where {name} {specs[name]} is due")
                file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def one(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A whole safetensors file."""
    specs = {name: Spec(x.dtype, x.shape) for name, x in tensors.items()}
    return b"".join([_header(specs, {}), *(np.ascontiguousarray(x).tobytes() for x in tensors.values())])


def _split(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded so that the data begin at a multiple of 8."""
    values: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        values[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
