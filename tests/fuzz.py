"""Damaged files through the real loaders, in a process of its own with limits of memory and of time per file.

    python -m tests.fuzz images|weights|records COUNT [--seed=0] [--first=0]

The last line printed is a JSON object: how many were read, how many refused, by how much the process grew at most, and
the longest that one took. Each damaged file is a function of seed and number: a file that kills the process, or raises
anything but UserError, is the last that is named, and --first=NUMBER begins with it.
"""

import contextlib
import io
import json
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from uae_jax.data import images, prepare, records, sources
from uae_jax.data.order import Order, Tally
from uae_jax.errors import UserError

SECONDS = 10.0  # of computing for one file; ten times as much on the clock, for the machine may be busy
GROWTH = 4 << 30  # bytes of address space, which threads take much of, that the process may take beyond its start
SIZE = 16  # pixels a side of what is read
LIMITS = images.Limits(max_bytes=1 << 20, max_pixels=1 << 20)
EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def main(arguments: list[str]) -> None:
    """Parses the command line and loads the damaged files."""
    options = dict(word.removeprefix("--").split("=") for word in arguments if word.startswith("--"))
    kind, count = [word for word in arguments if not word.startswith("--")]
    seed, first = int(options.get("seed", 0)), int(options.get("first", 0))
    warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
    with tempfile.TemporaryDirectory() as scratch:
        attempt = {"images": _images, "weights": _weights, "records": _records}[kind](Path(scratch))
        started = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        most = _memory("VmSize") + GROWTH
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        read, refused, slowest = 0, 0, 0.0
        for number in range(first, first + int(count)):
            print(number, file=sys.stderr, flush=True)
            at = time.process_time()
            # Their default action is the end, wherever the process hangs.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
            try:
                attempt(np.random.default_rng([seed, number]))
                read += 1
            except UserError as error:
                assert "\n" not in str(error) and "MemoryError" not in str(error), str(error)
                refused += 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.process_time() - at)
        peak = (_memory("VmHWM") - started) / 2**20
    result = {"files": read + refused, "read": read, "refused": refused, "grown_mib": peak, "slowest_s": slowest}
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))


def _memory(field: str) -> int:
    """Bytes, by /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


# ---- damage ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Some bits, bytes, numbers or stretches of a file changed, most of them near its beginning."""
    data = bytearray(content)
    for _ in range(int(rng.geometric(0.4))):
        if not data:
            break
        near = min(len(data), 128) if rng.random() < 0.6 else len(data)
        at, length = int(rng.integers(near)), int(rng.integers(1, 64))
        what = rng.integers(9)
        if what <= 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif what <= 2:
            data[at] = int(rng.integers(256))
        elif what <= 4:
            width = int(rng.choice([1, 2, 4]))
            number = int(rng.choice(EXTREME)) & (256**width - 1)
            data[at : at + width] = number.to_bytes(width, str(rng.choice(["little", "big"])))
        elif what == 5:
            del data[int(rng.integers(len(data))) :]
        elif what == 6:
            del data[at : at + length]
        elif what == 7:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 4)) if rng.random() < 0.5 else rng.bytes(length)
        else:
            other = others[int(rng.integers(len(others)))]
            start = int(rng.integers(len(other)))
            data[at : at + length] = other[start : start + length]
    return bytes(data)


def damaged_json(values: Any, rng: np.random.Generator) -> Any:
    """One to three values replaced by something of another kind or size, taken out, or renamed."""
    values = json.loads(json.dumps(values))
    for _ in range(int(rng.integers(1, 4))):
        spots = list(_spots(values))
        if not spots:
            break
        node, key = spots[int(rng.integers(len(spots)))]
        what = rng.integers(6)
        if what == 0:
            del node[key]
        elif what == 1 and isinstance(node, dict):
            node[str(rng.choice(["", "x", "../x", "\0", "\ud800", key * 2]))] = node.pop(key)
        elif what == 2:
            other, name = spots[int(rng.integers(len(spots)))]
            node[key] = json.loads(json.dumps(other[name]))
        else:
            node[key] = _strange(rng)
    return values


def _spots(values: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield values, key
        yield from _spots(values[key])


def _strange(rng: np.random.Generator) -> Any:
    numbers = [0, 1, -1, 3, 2**31, 2**63, 2**64 + 1, 10**30, 0.5, 1e308, float("nan"), float("inf"), -float("inf")]
    others = [None, True, False, "", "x", "\0", "../../x", "/etc/passwd", "\ud800", "x" * 100_000, [], {}, [[]], [0]]
    choices = [*numbers, *numbers, *others, [2**40] * 3, {"x": 1}, ["x"], [1, 2, 3, 4]]
    return choices[int(rng.integers(len(choices)))]


def damaged_text(values: Any, rng: np.random.Generator) -> bytes:
    """A JSON file whose values, or whose bytes, are damaged; some are nested too deep."""
    kind = rng.random()
    if kind < 0.05:
        return b"[" * 100_000
    if kind < 0.75:
        return json.dumps(damaged_json(values, rng)).encode()
    text = json.dumps(values).encode()
    return damaged(text, [text], rng)


# ---- images ----------------------------------------------------------------------------------------------------------


def pictures() -> list[bytes]:
    """Files of every format and mode that this Pillow can write."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 24 * 20 * 3).reshape(24, 20, 3) + rng.integers(0, 40, (24, 20, 3))
    rgb = Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8))
    rgba, grey, palette = rgb.convert("RGBA"), rgb.convert("L"), rgb.convert("P")
    rgba.putalpha(grey)
    sixteen = Image.fromarray(rng.integers(0, 65536, (24, 20), np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    frames = {"save_all": True, "append_images": [palette.rotate(90), palette.rotate(180)]}
    several = {"save_all": True, "append_images": [rgb.rotate(180)]}
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *((x, "PNG", {}) for x in (rgb, rgba, grey, sixteen, rgb.convert("1"), grey.convert("LA"))),
        (palette, "PNG", {"transparency": 3}),
        (rgb, "PNG", {"exif": exif}),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (grey, "JPEG", {}),
        (rgb, "MPO", several),
        (palette, "GIF", {}),
        (palette, "GIF", frames),
        *((x, "BMP", {}) for x in (rgb, palette, rgba)),
        *((x, "TIFF", {}) for x in (rgb, sixteen, rgb.convert("CMYK"))),
        *((rgb, "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        (rgb, "TIFF", several),
        (rgb, "PPM", {}),
        (grey, "PPM", {}),
    ]
    kinds += [(rgb, "WEBP", {"lossless": x, "exif": exif}) for x in (True, False)] * features.check("webp")
    kinds += [(rgba, "WEBP", several)] * features.check("webp")
    kinds += [(rgb, "JPEG2000", {}), (rgba, "JPEG2000", {})] * features.check("jpg_2000")
    kinds += [(rgba, "AVIF", {}), (rgb, "AVIF", several)] * features.check("avif")
    found = []
    for image, form, options in kinds:
        out = io.BytesIO()
        for each in (image, *options.get("append_images", ())):
            each.encoderconfig = ()  # what the last save has left there
        image.save(out, form, **options)
        found.append(out.getvalue())
    return found


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have their checksums again, so that a decoder sees more of it."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        end = at + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def damaged_picture(whole: list[bytes], rng: np.random.Generator) -> bytes:
    """One of them, damaged."""
    content = damaged(whole[int(rng.integers(len(whole)))], whole, rng)
    return with_checksums(content) if content.startswith(b"\x89PNG") and rng.random() < 0.7 else content


def _images(scratch: Path) -> Callable[[np.random.Generator], None]:
    whole, file = pictures(), scratch / "x.png"
    for content in whole:
        assert images.load_image(content, LIMITS).size in ((20, 24), (24, 20))

    def attempt(rng: np.random.Generator) -> None:
        content = damaged_picture(whole, rng)
        file.write_bytes(content)
        found = []
        for where in (content, file):  # as a shard has it, and as a folder has it
            read = sources.Pictures([records.Pair(where, "", "x")], SIZE, limits=LIMITS)
            with contextlib.suppress(images.BadImage):
                found.append(read.picture(0))
                assert found[-1].shape == (SIZE, SIZE, 3) and found[-1].dtype == np.uint8
        # One of both: the name's ending has no say in what a file is.
        assert len(found) in (0, 2) and all((x == found[0]).all() for x in found)
        if not found:
            raise UserError("refused")

    return attempt


# ---- shards, manifests and lists of pictures -------------------------------------------------------------------------


def _records(scratch: Path) -> Callable[[np.random.Generator], None]:
    root, out = scratch / "pictures", scratch / "shards"
    root.mkdir()
    for i in range(5):
        Image.fromarray(np.full((9, 8, 3), 40 * i, np.uint8)).save(root / f"{i}.png")
    lines = [{"file_name": f"{i}.png", "image": f"{i}.png", "caption": f"a {i}"} for i in range(5)]
    prepare.prepare(records.read_folder(root), out, 3, say=lambda line: None)
    manifest = json.loads((out / records.MANIFEST).read_text())
    shard = next(iter(out.glob("*.array_record")))
    content = shard.read_bytes()

    def attempt(rng: np.random.Generator) -> None:
        shard.write_bytes(content)
        (out / records.MANIFEST).write_text(json.dumps(manifest))
        kind = rng.integers(4)
        if kind == 0:
            (out / records.MANIFEST).write_bytes(damaged_text(manifest, rng))
        elif kind == 1:
            broken = damaged(content, [content], rng)
            shard.write_bytes(broken)
            noted = json.loads(json.dumps(manifest))
            for entry in noted["shards"]:
                if entry["file"] == shard.name:  # a length that is right lets it through to the reader
                    entry["bytes"] = len(broken)
            (out / records.MANIFEST).write_text(json.dumps(noted))
        else:
            name = root / ("metadata.jsonl" if kind == 2 else "list.jsonl")
            texts = [damaged_text(x, rng) if rng.random() < 0.4 else json.dumps(x).encode() for x in lines]
            name.write_bytes(b"\n".join(texts))
        if kind <= 1:
            source: records.Pairs = records.ArrayRecords(out)
        else:
            source = records.read_folder(root) if kind == 2 else records.read_pairs(root / "list.jsonl")
        records.identity(source)
        tally = Tally(len(source), 1.0)
        batches = sources.Batches(
            sources.Pictures(source, SIZE, limits=LIMITS), Order([range(len(source))], [1.0], 0), len(source), tally
        )
        batch, bad = batches.read(0)
        tally.add(bad)
        assert batch["image"].shape == (len(source), SIZE, SIZE, 3)
        prepare.prepare(source, scratch / "again", 3, LIMITS, say=lambda line: None)
        for i in range(len(source)):
            with contextlib.suppress(images.BadImage):
                source[i].caption.encode()
        shutil.rmtree(scratch / "again")

    def cleaned(rng: np.random.Generator) -> None:
        shutil.rmtree(scratch / "again", ignore_errors=True)
        attempt(rng)

    return cleaned


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights(scratch: Path) -> Callable[[np.random.Generator], None]:
    from uae_jax import pixels, system
    from uae_jax.convert import files, folder

    whole = []
    for name in ("clip", "dinov2", "siglip", "projector", "judge", "captioner"):
        source = folder.shipped("tiny") / name
        whole.append((source, 0))
    for name in ("clip", "projector"):  # in several files with an index
        found, target = folder.open_model(folder.shipped("tiny") / name), scratch / f"{name}_sharded"
        target.mkdir()
        specs = {name: files.Spec(x.dtype, x.shape) for name, x in found.tensors.items()}
        files.write(target, specs, found.tensors.items(), found.stem, shard_bytes=200_000)
        shutil.copy(found.folder / "config.json", target)
        whole.append((target, 2))
    place = scratch / "x"

    def attempt(rng: np.random.Generator) -> None:
        source, _ = whole[int(rng.integers(len(whole)))]
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)
        texts = sorted(path for path in place.iterdir() if path.suffix == ".json")
        if rng.random() < 0.5:
            path = texts[int(rng.integers(len(texts)))]
            path.write_bytes(damaged_text(json.loads(path.read_text()), rng))
        else:
            tensors = sorted(place.glob("*.safetensors"))
            path = tensors[int(rng.integers(len(tensors)))]
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = content[8 : 8 + size]
            if rng.random() < 0.5:
                header = damaged_text(json.loads(header), rng)
                content = len(header).to_bytes(8, "little") + header + content[8 + size :]
            else:
                content = damaged(content[: 8 + size], [content], rng) + content[8 + size :]
            path.write_bytes(content)
        found = folder.load_model(place)
        if (place / pixels.FILES[0]).is_file():
            pixels.load(place, found.config)
        if (place / "tokenizer.json").is_file():
            system.load_tokenizer(place).encode("a red square", add_special_tokens=False)

    return attempt


if __name__ == "__main__":
    main(sys.argv[1:])
