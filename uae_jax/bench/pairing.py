"""Which file of a folder of reconstructions redraws which source: Unified-Bench's rules, and what they leave over."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from uae_jax.data import images
from uae_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tiff", ".webp")


def find(folder: Path, flag: str) -> list[Path]:
    """The pictures in a folder and all below it, sorted.

    Raises:
      UserError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is no folder: name one with pictures")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{flag}: {folder} holds no picture ({', '.join(SUFFIXES)})")
    return found


class Pairs(NamedTuple):
    """Sources and their reconstructions."""

    chosen: dict[Path, Path]  # the reconstruction of each source that has one
    missing: list[Path]  # sources without
    unpaired: list[Path]  # reconstructions of no source
    duplicates: list[Path]  # further reconstructions of a source that has one


def source_of(reconstruction: Path, sources: list[Path]) -> Path | None:
    """The source that a file redraws: the one of its name, else of its stem, else the one that it calls recon_STEM."""
    rules: tuple[Callable[[Path], bool], ...] = (
        lambda source: source.name == reconstruction.name,
        lambda source: source.stem == reconstruction.stem,
        lambda source: f"recon_{source.stem}" == reconstruction.stem,
    )
    return next((source for rule in rules for source in sources if rule(source)), None)


def pair(sources: list[Path], reconstructions: list[Path]) -> Pairs:
    """Pairs two lists; of several reconstructions of one source the best match by `source_of`'s order is taken."""
    found: dict[Path, list[Path]] = {}
    unpaired = []
    for path in reconstructions:
        source = source_of(path, sources)
        if source is None:
            unpaired.append(path)
        else:
            found.setdefault(source, []).append(path)
    chosen: dict[Path, Path] = {}
    duplicates: list[Path] = []
    for source, candidates in found.items():
        best, *rest = sorted(candidates, key=lambda p: (p.name != source.name, p.stem != source.stem))
        chosen[source] = best
        duplicates += rest
    return Pairs(chosen, [source for source in sources if source not in found], unpaired, sorted(duplicates))


def as_pil(path: Path) -> Image.Image:
    """A picture as the official scorer opens it: not turned by its EXIF orientation, transparency dropped.

    Raises:
      BadImage: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise anything on broken bytes
        raise images.BadImage(path, " ".join(str(error).split()) or type(error).__name__) from error
