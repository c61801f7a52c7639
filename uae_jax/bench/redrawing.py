"""Pictures for Unified-Bench by a unified multimodal model: captions, its own or any captioner's, redrawn.

Beside the redraws stand controls, drawn from the same noise: the caption of another picture, no caption, and captions
of one length.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from uae_jax import storage
from uae_jax.bench import pairing, unified_bench
from uae_jax.bench.caption_duel import read_captions
from uae_jax.bench.held_out import Evaluator
from uae_jax.data import images
from uae_jax.data.text import decode_captions
from uae_jax.errors import UserError
from uae_jax.pictures import save_png
from uae_jax.system import System
from uae_jax.umm import Params


class Captions(NamedTuple):
    """Captions of n pictures, as token ids that end with the end token unless they were cut."""

    tokens: np.ndarray  # int32 [n, t]
    mask: np.ndarray  # bool [n, t]

    def lengths(self, end_token: int) -> np.ndarray:
        """Tokens of each, the end token not counted: int [n]."""
        return (self.mask & (self.tokens != end_token)).sum(1)


class Canvas(NamedTuple):
    """A model before n pictures: it captions them, and draws them always from the same noise."""

    write: Callable[[], Captions]
    draw: Callable[[Captions], np.ndarray]  # redraws in 0..1 [n, size, size, 3]


class Redrawer(NamedTuple):
    """A model that captions and draws."""

    size: int  # pixels of each side of what it sees and draws
    most_tokens: int  # of a caption, its end token included
    end_token: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Captions], list[str]]
    before: Callable[[np.ndarray], Canvas]  # pictures uint8 [n, size, size, 3]


def redrawer(config: Any, system: System, mesh: jax.sharding.Mesh, params: Params) -> Redrawer:
    """The model of a run or of a folder of weights, with the captions of `config.eval`."""

    def before(pictures: np.ndarray) -> Canvas:
        evaluator = Evaluator(config, system, mesh, pictures)
        return Canvas(
            write=lambda: Captions(*evaluator.write(params)[:2]),
            draw=lambda captions: evaluator.draw(params, *captions)["image"],
        )

    return Redrawer(
        size=config.data.image_size,
        most_tokens=config.rl.max_tokens,
        end_token=system.prompts.end_token,
        encode=lambda text: system.tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda captions: decode_captions(system.tokenizer, *captions),
        before=before,
    )


def encoded(texts: list[str], model: Redrawer) -> Captions:
    """Texts as the captions of a run are: padded to `model.most_tokens`, and cut there.

    As wide as in training, since a decoder may see the padding (`config.mask_text`).
    """
    tokens = np.full((len(texts), model.most_tokens), model.end_token, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, text in enumerate(texts):
        ids = [*model.encode(text), model.end_token][: model.most_tokens]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    return Captions(tokens, mask)


def cut(captions: Captions, lengths: np.ndarray, end_token: int) -> Captions:
    """Captions of at most so many tokens [n], then the end token."""
    at = np.arange(captions.tokens.shape[1])
    kept = np.minimum(captions.lengths(end_token), lengths)[:, None]
    return Captions(np.where(at < kept, captions.tokens, end_token), at <= kept)


def shuffled(captions: Captions, rows: np.ndarray) -> Captions:
    """Each of the captions `rows` in the place of the one before it, the first in that of the last."""
    order = np.arange(len(captions.tokens))
    order[rows] = np.roll(rows, -1)
    return Captions(captions.tokens[order], captions.mask[order])


def variants(systems: Mapping[str, Captions], present: Mapping[str, np.ndarray], end_token: int) -> dict[str, Captions]:
    """Every system's captions under its name, and under name/control its controls.

    `same_length` cuts captions to one length: of one system, to that of its shortest that is not empty; of two, picture
    by picture to the shorter of the two.

    Args:
      systems: one or two.
      present: of each, which pictures it has a caption of: bool [n].
    """
    lengths = np.stack([captions.lengths(end_token) for captions in systems.values()])
    if len(systems) > 1:
        shorter = lengths.min(0)
    else:
        shorter = np.full_like(lengths[0], lengths[lengths > 0].min(initial=lengths.max(initial=0)))
    found = {}
    for name, captions in systems.items():
        found[name] = captions
        if present[name].sum() > 1:
            found[f"{name}/shuffled_captions"] = shuffled(captions, np.flatnonzero(present[name]))
        found[f"{name}/empty_caption"] = cut(captions, np.zeros_like(shorter), end_token)
        found[f"{name}/same_length"] = cut(captions, shorter, end_token)
    return found


def targets(sources: unified_bench.Sources) -> list[Path]:
    """Where each usable source's redraw goes below a folder: its own place, as PNG.

    Raises:
      UserError: two would have the same one.
    """
    found = [path.relative_to(sources.root).with_suffix(".png") for path in sources.usable]
    stems = [path.stem for path in found]
    twice = sorted({str(path) for path in found if stems.count(path.stem) > 1})
    if twice:
        raise UserError(f"--sources: files are told apart by their stem, which {', '.join(twice)} share: rename them")
    return found


def matched(path: Path, sources: unified_bench.Sources) -> tuple[list[str | None], list[str]]:
    """A file's caption of each usable source (by name, else by stem), and the entries that are of no source.

    Raises:
      UserError: the file is none of captions, or has none of these pictures.
    """
    texts: dict[Path, str] = {}
    left = []
    for name, text in read_captions(path).items():
        source = pairing.source_of(Path(name), sources.usable)
        if source is None or source in texts:
            left.append(name)
        else:
            texts[source] = text
    if not texts:
        raise UserError(f"{path} has no caption of a picture in {sources.root}: they are paired by file_name or stem")
    return [texts.get(source) for source in sources.usable], left


def run(
    sources: Path,
    model: Redrawer,
    towers: Mapping[str, Path],
    out: Path,
    captions: Path | None = None,
    against: Path | None = None,
    compat: bool = False,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Captions, redraws and scores a folder of pictures, with controls; writes what `unified_bench.run` writes.

    Also writes the model's own captions (captions.jsonl), and every redraw, a folder a control.

    Args:
      sources: folder of pictures.
      model: draws, and captions where `captions` does not.
      towers, out, compat, batch_size: as for `unified_bench.run`.
      captions: a file of any captioner's (`caption_duel.read_captions`), instead of the model's own.
      against: a second captioner's, for a paired comparison under the same decoder.

    Raises:
      UserError: as `unified_bench.run`; or a file of captions cannot be read, or fits no source.
    """
    unified_bench.open_towers(towers)
    found = unified_bench.read_sources(sources, compat)
    places = targets(found)
    files = {"redrawn": captions} | ({"against": against} if against else {})
    given = {name: matched(path, found) for name, path in files.items() if path is not None}
    seen = np.stack([images.fit(unified_bench.opener(compat)(path), model.size) for path in found.usable])
    canvas = model.before(seen)
    texts: dict[str, Captions] = {}
    if captions is None:
        texts["redrawn"] = canvas.write()
        own = zip(found.usable, model.decode(texts["redrawn"]), strict=True)
        lines = [json.dumps({"file_name": p.relative_to(sources).as_posix(), "text": text}) for p, text in own]
        storage.write_atomic(out / "captions.jsonl", ("\n".join(lines) + "\n").encode())
    texts |= {name: encoded([text or "" for text in rows], model) for name, (rows, _) in given.items()}
    texts = {name: texts[name] for name in files}
    everything = np.ones(len(seen), bool)
    present = dict.fromkeys(files, everything) | {
        name: np.array([text is not None for text in rows]) for name, (rows, _) in given.items()
    }
    systems = {}
    drawn = variants(texts, present, model.end_token)
    for name, tokens in drawn.items():
        pictures = canvas.draw(tokens)
        chosen = {}
        for i in np.flatnonzero(present[name.split("/")[0]]):
            chosen[found.usable[i]] = target = out / name.replace("/", "_") / places[i]
            save_png(target, pictures[i])
        missing = [path for path in found.usable if path not in chosen]
        size = (model.size, model.size)
        systems[name] = unified_bench.System(
            pairing.Pairs(chosen, missing, [], []), {}, dict.fromkeys(chosen.values(), size), "no caption"
        )
    result = unified_bench.results(found, systems, towers, compat, batch_size)
    result["captions"] = {
        name: {
            "tokens": float(drawn[name].lengths(model.end_token)[present[name]].mean()),
            "tokens_at_same_length": float(drawn[f"{name}/same_length"].lengths(model.end_token)[present[name]].mean()),
            "cut": int((tokens.mask[:, -1] & (tokens.tokens[:, -1] != model.end_token)).sum()),
            "of_no_source": given[name][1] if name in given else [],
        }
        for name, tokens in texts.items()
    }
    unified_bench.write(result, out)
    return result
