"""Unified-Bench, protocol 1: how similar a redrawn picture is to its source, by several towers.

By tower the mean cosine times 100, not clamped; overall the plain mean of the towers' means. A source whose
reconstruction is missing or cannot be read counts as 0 and is listed; the official script leaves it out of the mean
(`compat`).
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from uae_jax import pixels, printable, rewards, storage
from uae_jax.bench import pairing, scores
from uae_jax.convert import folder
from uae_jax.data import images
from uae_jax.errors import UserError
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.siglip.config import Config as SigLIPConfig
from uae_jax.pixels import process

# What a tower of a known name must be; other names may be any tower.
KNOWN = {
    "clip": CLIPConfig,
    "longclip": CLIPConfig,
    "dinov2": DINOv2Config,
    "dinov3": DINOv3Config,
    "siglip": SigLIPConfig,
}


Size = tuple[int, int]  # width and height in pixels


class Sources(NamedTuple):
    """The source pictures in a folder."""

    root: Path
    usable: list[Path]
    bad: dict[Path, str]  # those that cannot be read, and why
    sizes: dict[Path, Size]  # of the usable ones


class System(NamedTuple):
    """One system's pictures: what is scored, and what is wrong with its folder."""

    pairs: pairing.Pairs
    unreadable: dict[Path, str]  # reconstructions, and why
    sizes: dict[Path, Size]  # of the readable ones
    absent: str = "no reconstruction"  # what is said of a source without


LISTED = ("missing", "unpaired", "duplicates", "bad_sources", "other_size")  # in a result, and counted under its table


class Scored(NamedTuple):
    """Cosines of one system."""

    cosines: dict[str, np.ndarray]  # by tower [n]: one a source, NaN where it has no readable reconstruction
    shuffled: dict[str, np.ndarray]  # by tower [m]: with the reconstruction of the next source instead


def open_towers(folders: Mapping[str, Path]) -> dict[str, folder.Checkpoint]:
    """Checks the towers' folders before anything is computed.

    Raises:
      UserError: one is no tower, or not the one that its name says.
    """
    found = {}
    for name, path in folders.items():
        found[name] = checkpoint = folder.open_model(path)
        try:
            pixels.load(path, checkpoint.config)
        except UserError as error:
            raise UserError(f"--towers {name}: {path} holds a {checkpoint.architecture}: {error}") from None
        if name in KNOWN and not isinstance(checkpoint.config, KNOWN[name]):
            raise UserError(
                f"--towers {name}: {path} holds a {checkpoint.architecture}, which is no {name}: name another folder, "
                "or call it something else"
            )
    return found


def opener(compat: bool) -> Callable[[Path], Image.Image]:
    """How pictures are opened."""
    return pairing.as_pil if compat else images.load_image


def measured(paths: Iterable[Path], compat: bool) -> tuple[dict[Path, Size], dict[Path, str]]:
    """Sizes of those that can be read, and why the others cannot."""
    sizes, bad = {}, {}
    for path in paths:
        try:
            sizes[path] = opener(compat)(path).size
        except images.BadImage as error:
            bad[path] = error.reason
    return sizes, bad


def read_sources(root: Path, compat: bool) -> Sources:
    """Finds and reads the sources.

    Raises:
      UserError: the folder is missing or empty, or no picture in it can be read.
    """
    found = pairing.find(root, "--sources")
    sizes, bad = measured(found, compat)
    if not sizes:
        raise UserError(
            f"--sources: none of the {len(found)} pictures in {root} can be read ({next(iter(bad.values()))})"
        )
    return Sources(root, list(sizes), bad, sizes)


def read_system(flag: str, folder: Path, sources: Sources, compat: bool) -> System:
    """Pairs and reads a folder of reconstructions.

    Raises:
      UserError: the folder is missing or empty, or nothing in it can be scored.
    """
    pairs = pairing.pair(sorted([*sources.usable, *sources.bad]), pairing.find(folder, flag))
    sizes, unreadable = measured(pairs.chosen.values(), compat)
    if not any(pairs.chosen.get(source) in sizes for source in sources.usable):
        raise UserError(
            f"{flag}: no readable file in {folder} redraws a source in {sources.root}: files are paired by name, by "
            "stem, or as recon_STEM"
        )
    return System(pairs, unreadable, sizes)


def features(
    where: Path, paths: list[Path], load: Callable[[Path], Image.Image], batch_size: int
) -> dict[Path, np.ndarray]:
    """Unit vectors of pictures of any size by the tower in a folder: {path: [d]}."""
    model = folder.load_model(where)
    how, embed = pixels.load(where, model.config), jax.jit(rewards.embedding(model.config, jnp.float32))
    # One small program for each size of picture; the tower is compiled once.
    prepare = jax.jit(lambda image: process(image.astype(jnp.float32) / 255, how, rounded=True))
    found: dict[Path, np.ndarray] = {}
    for start in range(0, len(paths), batch_size):
        part = paths[start : start + batch_size]
        batch = np.stack([prepare(np.asarray(load(path), np.uint8)) for path in part])
        batch = np.pad(batch, [(0, batch_size - len(part)), *[(0, 0)] * 3])
        found |= dict(zip(part, np.asarray(embed(model.params, batch)), strict=False))
    return found


def score(
    sources: list[Path],
    systems: Mapping[str, System],
    towers: Mapping[str, Path],
    load: Callable[[Path], Image.Image],
    batch_size: int,
) -> dict[str, Scored]:
    """Cosines of each system's pictures with readable sources; a source's features are computed once a tower."""
    usable = {
        name: {s: p for s, p in system.pairs.chosen.items() if s in sources and p in system.sizes}
        for name, system in systems.items()
    }
    found = {name: Scored({}, {}) for name in systems}
    for tower, where in towers.items():
        pictures = {p for pairs in usable.values() for pair in pairs.items() for p in pair}
        vectors = features(where, sorted(pictures), load, batch_size)
        for name, pairs in usable.items():
            cosine = {s: float(vectors[s].astype(np.float64) @ vectors[p]) for s, p in pairs.items()}
            found[name].cosines[tower] = np.array([cosine.get(source, np.nan) for source in sources])
            present = [source for source in sources if source in pairs]
            others = [pairs[source] for source in present[1:] + present[:1]]
            found[name].shuffled[tower] = np.array(
                [vectors[s] @ vectors[p] for s, p in zip(present, others, strict=True)]
            )
    return found


def counted(cosines: Mapping[str, np.ndarray], compat: bool) -> scores.Scores:
    """Scores in points (100 times the cosine) by tower and "overall"; failures count 0, or not at all with `compat`."""
    by_tower = {}
    for name, values in cosines.items():
        ok = ~np.isnan(values)
        points = np.where(ok, 100 * values, 0.0)
        by_tower[name] = scores.Score(points, ok.astype(float) if compat else np.ones(len(values)))
    parts = list(by_tower.values())
    # All towers see the same images, so that the mean of their means is the mean of an image's means.
    return by_tower | {"overall": scores.Score(np.mean([s.sums for s in parts], axis=0), parts[0].counts)}


def bounded(score: scores.Score) -> dict[str, Any]:
    """Mean with its 95% interval and the number of images that count."""
    sums = score.sums[score.counts > 0]
    moved = scores.change(scores.each(0 * sums), scores.each(sums))
    values: dict[str, Any] = {"mean": None, "low": None, "high": None} if moved is None else moved.json()
    return values | {"n": int(score.counts.sum())}


def summary(scored: Scored, compat: bool) -> dict[str, Any]:
    """Points: `overall` with its interval, and `by_tower`."""
    found = {name: bounded(value) for name, value in counted(scored.cosines, compat).items()}
    overall = found.pop("overall")
    return {
        "overall": overall["mean"],
        "overall_interval": [overall["low"], overall["high"]],
        "by_tower": found,
    }


def report(sources: Sources, system: System, scored: Scored, compat: bool) -> dict[str, Any]:
    """The result as it is written to JSON.

    Points (times 100) in `overall`, `by_tower` and `controls`; cosines in `per_image` and in the official script's own
    keys (`similarities_by_model` and so on).
    """
    head = summary(scored, compat)
    found = head["by_tower"]
    names = {source: source.relative_to(sources.root).as_posix() for source in sources.usable}
    reasons = dict.fromkeys(system.pairs.missing, system.absent)
    reasons |= {
        s: f"unreadable: {system.unreadable[p]}" for s, p in system.pairs.chosen.items() if p in system.unreadable
    }
    cosines = {
        tower: {
            names[source]: None if np.isnan(value) else float(value)
            for source, value in zip(sources.usable, values, strict=True)
        }
        for tower, values in scored.cosines.items()
    }
    statistics: dict[str, dict[str, Any]] = {}
    for tower, by_name in cosines.items():
        valid = [value for value in by_name.values() if value is not None]
        statistics[tower] = {
            "total_images": len(by_name),
            "valid_pairs": len(valid),
            "average_similarity": None if found[tower]["mean"] is None else found[tower]["mean"] / 100,
            "min_similarity": min(valid, default=None),
            "max_similarity": max(valid, default=None),
        }
    averages = {
        tower: s["average_similarity"] for tower, s in statistics.items() if s["average_similarity"] is not None
    }
    return {
        **head,
        "missing": [{"source": names[s], "reason": reasons[s]} for s in sources.usable if s in reasons],
        "unpaired": [str(path) for path in system.pairs.unpaired],
        "duplicates": [str(path) for path in system.pairs.duplicates],
        "other_size": [
            {"source": names[s], "size": list(sources.sizes[s]), "reconstruction": list(system.sizes[p])}
            for s, p in system.pairs.chosen.items()
            if s in names and system.sizes.get(p, sources.sizes[s]) != sources.sizes[s]
        ],
        "failures_count_as": None if compat else 0,
        "controls": {
            "another_source": {name: 100 * float(v.mean()) for name, v in scored.shuffled.items() if len(v) > 1}
        },
        "per_image": {name: {tower: cosines[tower][name] for tower in cosines} for name in names.values()},
        "model_types": list(cosines),
        "similarities_by_model": cosines,
        "statistics_by_model": statistics,
        "summary": {
            "models_used": list(cosines),
            "average_scores_by_model": averages,
            "overall_average": float(np.mean(list(averages.values()))) if averages else None,
            "best_model": max(averages, key=averages.__getitem__, default=None),
            "worst_model": min(averages, key=averages.__getitem__, default=None),
        },
    }


def compared(first: Scored, second: Scored, compat: bool) -> dict[str, Any]:
    """First minus second in points, by tower and overall, with the interval of a paired bootstrap over images.

    With `compat` only images count that both have.
    """
    if compat:
        known = [~np.isnan(values) for system in (first, second) for values in system.cosines.values()]
        both = np.logical_and.reduce(known)
        first, second = (Scored({name: v[both] for name, v in x.cosines.items()}, {}) for x in (first, second))
    moved = scores.changes(counted(second.cosines, compat), counted(first.cosines, compat))
    return {name: None if value is None else value.json() for name, value in moved.items()}


def markdown(result: Mapping[str, Any]) -> str:
    """The result as tables."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def line(name: str, mean: float | None, ends: Sequence[float | None], n: int | str) -> str:
        return f"| {printable.markdown(name)} | {number(mean)} | {number(ends[0])} to {number(ends[1])} | {n} |"

    lines = ["| tower | score | 95% interval | images |", "|---|---|---|---|"]
    lines += [line(name, v["mean"], (v["low"], v["high"]), v["n"]) for name, v in result["by_tower"].items()]
    lines.append(line("**overall**", result["overall"], result["overall_interval"], ""))
    controls = {name: v for name, v in result["controls"].items() if "overall" in v}
    if controls:
        towers = list(result["by_tower"])
        lines += [
            "",
            f"| control | overall | 95% interval | {' | '.join(map(printable.markdown, towers))} |",
            "|---" * (3 + len(towers)) + "|",
        ]
        for name, v in controls.items():
            low, high = v["overall_interval"]
            means = " | ".join(number(v["by_tower"][tower]["mean"]) for tower in towers)
            lines.append(
                f"| {printable.markdown(name)} | {number(v['overall'])} | {number(low)} to {number(high)} | {means} |"
            )
    for key, title in (("difference", "difference"), ("difference_at_same_length", "at the same caption length")):
        if key in result.get("against", {}):
            lines += ["", f"| {title} | points | 95% interval (paired) |", "|---|---|---|"]
            for name, moved in result["against"][key].items():
                v = moved or {"mean": None, "low": None, "high": None}
                lines.append(
                    f"| {printable.markdown(name)} | {number(v['mean'])} | {number(v['low'])} to {number(v['high'])} |"
                )
    counts = ", ".join(f"{len(result[k])} {k}" for k in LISTED)
    return "\n".join([*lines, "", f"Files: {counts}."]) + "\n"


def table(result: Mapping[str, Any]) -> str:
    """One row an image, as CSV: source, each tower's cosine, and what is wrong."""
    reasons = {entry["source"]: entry["reason"] for entry in result["missing"]}
    towers = list(result["by_tower"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["source", *map(printable.cell, towers), "failure"])
    for name, values in result["per_image"].items():
        row = ["" if values[t] is None else f"{values[t]:.6f}" for t in towers]
        writer.writerow([printable.cell(name), *row, printable.cell(reasons.get(name, ""))])
    return out.getvalue()


def run(
    sources: Path,
    reconstructions: Path,
    towers: Mapping[str, Path],
    out: Path,
    against: Path | None = None,
    compat: bool = False,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Scores a folder of reconstructions, and writes unified_bench.json, .csv and .md.

    Args:
      sources, reconstructions: folders of pictures, paired by `pairing.pair`.
      towers: model folders by name.
      out: where the results go.
      against: a second system's reconstructions of the same sources, for a paired comparison.
      compat: as the official script: failures are dropped from the mean, pictures opened as PIL opens them.
      batch_size: pictures at once.

    Raises:
      UserError: a folder is missing or empty, a tower is not what it should be, or nothing can be scored.
    """
    open_towers(towers)
    found = read_sources(sources, compat)
    systems = {"redrawn": read_system("--reconstructions", reconstructions, found, compat)}
    if against:
        systems["against"] = read_system("--against", against, found, compat)
    result = results(found, systems, towers, compat, batch_size)
    write(result, out)
    return result


def results(
    sources: Sources, systems: Mapping[str, System], towers: Mapping[str, Path], compat: bool, batch_size: int
) -> dict[str, Any]:
    """The whole result, ready for JSON.

    Args:
      systems: "redrawn"; if there is a second one, "against"; and controls of both, as "redrawn/empty_caption".
    """
    scored = score(sources.usable, systems, towers, opener(compat), batch_size)

    def result_of(name: str) -> dict[str, Any]:
        found = report(sources, systems[name], scored[name], compat)
        for other in scored:
            if other.startswith(f"{name}/"):
                found["controls"][other.split("/")[1]] = summary(scored[other], compat)
        return found

    result = result_of("redrawn")
    result["bad_sources"] = {p.relative_to(sources.root).as_posix(): reason for p, reason in sources.bad.items()}
    if "against" in systems:
        difference = compared(scored["redrawn"], scored["against"], compat)
        result["against"] = {**result_of("against"), "difference": difference}
        if "against/same_length" in systems:
            same = compared(scored["redrawn/same_length"], scored["against/same_length"], compat)
            result["against"]["difference_at_same_length"] = same
    return result


def write(result: Mapping[str, Any], out: Path) -> None:
    """Writes unified_bench.json, .csv and .md."""
    with storage.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for suffix, text in (
            ("json", json.dumps(result, indent=2) + "\n"),
            ("csv", table(result)),
            ("md", markdown(result)),
        ):
            storage.write_atomic(out / f"unified_bench.{suffix}", text.encode())
