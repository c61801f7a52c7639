"""Unified-Bench, protocol 2: which of two captions of a picture vision-language judges prefer.

Each pair is asked in both orders. A judge's verdict on a picture is a win or a loss only where both orders agree; ties,
verdicts that follow the order, and answers that are no verdict are counted apart and are in no rate. The paper's own
prompt is not public: rates are comparable among runs of this one only.
"""

import base64
import io
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uae_jax import printable, storage
from uae_jax.bench import judges, scores
from uae_jax.data import images
from uae_jax.errors import UserError

PROMPT = """You see a picture and two descriptions of it. Decide which description would let a painter who has never \
seen the picture reproduce it more faithfully: what is there, how many, where, how it looks. A false statement weighs \
more than a missing one. Length and style do not count.

Description A:
{a}

Description B:
{b}

Answer with one JSON object and nothing else: {{"verdict": "A"}}, {{"verdict": "B"}} or {{"verdict": "tie"}}."""
LONGEST_SIDE = 1024  # pixels that a judge sees
IMAGE_TOKENS, ANSWER_TOKENS = 1000, 15  # for the estimate alone
OUTCOMES = ("win", "loss", "tie", "inconsistent", "unparsable", "failed")


class Question(NamedTuple):
    """A picture, a judge and an order."""

    picture: str
    judge: str
    swapped: bool  # the second system's caption is called A


def read_captions(path: Path) -> dict[str, str]:
    """Lines {"file_name": ..., "text": ...} -> {file_name: text}.

    Raises:
      UserError: the file cannot be read, or a line is not of that form, or a file comes twice.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): name a file of captions, one JSON object a line") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}') from None
        if not (isinstance(name, str) and isinstance(text, str)):
            raise UserError(f"{path}, line {number}: file_name and text must be strings")
        if name in found:
            raise UserError(f"{path}, line {number}: {name} has a caption already")
        found[name] = text
    return found


def data_url(path: Path) -> str:
    """A picture as judges get it: upright, at most `LONGEST_SIDE` pixels a side, JPEG.

    Raises:
      BadImage: it cannot be read.
    """
    picture = images.load_image(path)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def verdict(answer: str) -> str | None:
    """A, B or tie of a strict answer (a code fence round it is allowed); None where it is none."""
    text = answer.strip()
    if text.startswith("```") and text.endswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or list(found) != ["verdict"]:
        return None
    return found["verdict"] if found["verdict"] in ("A", "B", "tie") else None


def outcome(plain: str | None, swapped: str | None) -> str:
    """Of the two verdicts on a picture, for the system whose caption is A in the plain order."""
    if plain is None or swapped is None:
        return "unparsable"
    turned = {"A": "B", "B": "A", "tie": "tie"}[swapped]
    if plain != turned:
        return "inconsistent"
    return {"A": "win", "B": "loss", "tie": "tie"}[plain]


def rate(outcomes: list[str]) -> dict[str, Any]:
    """Wins among wins and losses in percent with its 95% interval (bootstrap over pictures), and all counts."""
    won = np.array([x == "win" for x in outcomes if x in ("win", "loss")], float)
    moved = scores.change(scores.each(0 * won), scores.each(100 * won))
    value = {"mean": None, "low": None, "high": None} if moved is None else moved.json()
    return {"win_rate": value, "n": len(won), **{name: outcomes.count(name) for name in OUTCOMES}}


def agreement(outcomes: Mapping[str, list[str]]) -> dict[str, Any]:
    """For each two judges: on which share of the pictures that both decide they decide alike."""
    found = {}
    for a, b in itertools.combinations(outcomes, 2):
        both = [(x, y) for x, y in zip(outcomes[a], outcomes[b], strict=True) if {x, y} <= {"win", "loss"}]
        share = sum(x == y for x, y in both) / len(both) if both else None
        found[f"{a}, {b}"] = {"share": share, "n": len(both)}
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines = [f"| judge | win rate | 95% interval | {' | '.join(OUTCOMES)} |", "|---" * (3 + len(OUTCOMES)) + "|"]
    for name, found in result["by_judge"].items():
        mean, low, high = ("-" if x is None else f"{x:.1f}" for x in found["win_rate"].values())
        lines.append(
            f"| {printable.markdown(name)} | {mean} | {low} to {high} | {' | '.join(str(found[k]) for k in OUTCOMES)} |"
        )
    mean = result["average"]
    lines += ["", f"Average over judges: {'-' if mean is None else f'{mean:.1f}'}"]
    return "\n".join(lines) + "\n"


def run(
    sources: Path,
    captions: Path,
    against: Path,
    panel: list[judges.Judge],
    out: Path,
    limits: judges.Limits,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Asks the judges about every picture that both files caption; writes caption_duel.json and .md.

    Args:
      sources: folder of the pictures.
      captions, against: jsonl files of the two systems (`read_captions`).
      panel: the judges.
      out: results and the cache of answers: a run that was stopped goes on where it was.
      dry_run: only the estimate, which is printed in any case.

    Raises:
      UserError: a file cannot be read, nothing can be compared, or an endpoint refuses.
    """
    if len({judge.name for judge in panel}) < len(panel):
        raise UserError("--judge: two judges have the same name")
    first, second = read_captions(captions), read_captions(against)
    urls, bad = {}, {}
    for name in sorted(first.keys() & second.keys()):
        try:
            urls[name] = data_url(sources / name)
        except images.BadImage as error:
            bad[name] = error.reason
    if not urls:
        raise UserError(f"no readable picture in {sources} has a caption in both {captions} and {against}")

    def request(picture: str, judge: judges.Judge, swapped: bool) -> judges.Request:
        a, b = (second, first) if swapped else (first, second)
        text = PROMPT.format(a=a[picture], b=b[picture])
        content = [{"type": "image_url", "image_url": {"url": urls[picture]}}, {"type": "text", "text": text}]
        return judges.Request(judge, [{"role": "user", "content": content}])

    asked = {
        Question(picture, judge.name, swapped): request(picture, judge, swapped)
        for picture in urls
        for judge in panel
        for swapped in (False, True)
    }
    cache = out / "caption_duel_answers.jsonl"
    cost = judges.estimate(asked.values(), IMAGE_TOKENS, ANSWER_TOKENS, cache)
    for name, found in cost.items():
        print(
            f"{name}: {found['requests']} requests, about {found['tokens_in']:,} tokens in and "
            f"{found['tokens_out']:,} out, ${found['dollars']:.2f}",
            file=sys.stderr,
        )
    if dry_run:
        return {"estimate": cost}
    answers, failures = judges.ask(asked.values(), cache, limits)

    def decide(picture: str, judge: str) -> str:
        digests = [asked[Question(picture, judge, swapped)].digest for swapped in (False, True)]
        if any(digest in failures for digest in digests):
            return "failed"
        return outcome(*(verdict(answers[digest]) for digest in digests))

    outcomes = {judge.name: [decide(picture, judge.name) for picture in urls] for judge in panel}
    by_judge = {name: rate(found) for name, found in outcomes.items()}
    means = [found["win_rate"]["mean"] for found in by_judge.values() if found["win_rate"]["mean"] is not None]
    result = {
        "by_judge": by_judge,
        "average": float(np.mean(means)) if means else None,
        "agreement": agreement(outcomes),
        "per_image": {p: {name: found[i] for name, found in outcomes.items()} for i, p in enumerate(urls)},
        "failures": sorted({*failures.values()}),
        "bad_images": bad,
        "only_in_captions": sorted(first.keys() - second.keys()),
        "only_in_against": sorted(second.keys() - first.keys()),
        "estimate": cost,
    }
    storage.write_atomic(out / "caption_duel.json", (json.dumps(result, indent=2) + "\n").encode())
    storage.write_atomic(out / "caption_duel.md", markdown(result).encode())
    return result
