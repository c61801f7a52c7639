"""Checks captions against scenes: recall and precision of facts, forced-choice questions, control captions.

A fact of an object is its shape, colour, size or position (row and column together); a scene adds two, the number of
objects and the background. A stated fact is right if it holds of the object that the mention is matched to.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.grammar import Description, Mention
from uae_jax.data.shapes.scene import BACKGROUNDS, CELLS, COLOURS, GRID, SHAPES, SIZES, Object, Scene

FIELDS = {"shape": "shape", "colour": "colour", "size": "size", "position": "cell"}  # fact -> field
CATEGORIES = (*FIELDS, "count", "background", "small_objects")


def _agreement(mention: Mention, o: Object) -> int:
    return sum(getattr(mention, field) == getattr(o, field) for field in FIELDS.values())


def match(description: Description | None, scene: Scene) -> list[int | None]:
    """For each described object the index of its true object, None for those left over; [] for None.

    The assignment is one to one, as many as there are on the shorter side, with the most agreeing attributes; among
    equally good ones the first in lexicographic order.
    """
    if description is None:
        return []
    mentions, n = description.objects, len(scene.objects)
    agree = [[_agreement(m, o) for o in scene.objects] + [0] * len(mentions) for m in mentions]
    ways = itertools.permutations(range(max(n, len(mentions))), len(mentions))
    best = max(ways, key=lambda way: sum(row[i] for row, i in zip(agree, way, strict=True)))
    return [i if i < n else None for i in best]


def tallies(descriptions: Sequence[Description | None], scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Facts shown, facts stated and facts rightly stated, image by image.

    Every scene has 4 facts an object, `count` and `background`. A caption that names at least one object states a
    count. A malformed caption (None) states nothing. `small_objects` is a view, not added to `all`: shown are all facts
    of small objects, stated what is said of mentions matched to small objects.

    Args:
      descriptions: one a caption, from `grammar.parse`.
      scenes: as many.

    Returns:
      {"all" or a category: int [n, 3]}; recall is right / shown, precision right / stated.
    """
    tally = {name: np.zeros((len(scenes), 3), int) for name in CATEGORIES}
    for n, (description, scene) in enumerate(zip(descriptions, scenes, strict=True)):
        for o in scene.objects:
            for name in (*FIELDS, *(["small_objects"] * len(FIELDS) if SIZES[o.size] == "small" else [])):
                tally[name][n, 0] += 1
        tally["count"][n, 0] = tally["background"][n, 0] = 1
        if description is None:
            continue
        for mention, i in zip(description.objects, match(description, scene), strict=True):
            true = None if i is None else scene.objects[i]
            small = true is not None and SIZES[true.size] == "small"
            for name, field in FIELDS.items():
                said = getattr(mention, field)
                if said is not None:
                    right = true is not None and said == getattr(true, field)
                    tally[name][n] += (0, 1, right)
                    if small:
                        tally["small_objects"][n] += (0, 1, right)
        if description.objects:
            tally["count"][n] += (0, 1, len(description.objects) == len(scene.objects))
        if description.background is not None:
            tally["background"][n] += (0, 1, description.background == scene.background)
    everything = np.sum([counts for name, counts in tally.items() if name != "small_objects"], axis=0)
    return {"all": everything, **tally}


def _moves(objects: tuple[Object, ...], i: int, attribute: str) -> list[int]:
    """Cells of object i's column (attribute "row") or row ("column") that keep the objects sorted by cell."""
    low = objects[i - 1].cell if i else -1
    high = objects[i + 1].cell if i + 1 < len(objects) else CELLS
    o = objects[i]
    cells = [GRID * k + o.column if attribute == "row" else GRID * o.row + k for k in range(GRID)]
    return [cell for cell in cells if low < cell < high]


def alternatives(scene: Scene, rng: np.random.Generator) -> list[tuple[str, list[str], int]]:
    """Forced-choice questions: the complete caption among copies with one attribute of one random object replaced.

    For "shape" (6 captions), "colour" (8), "size" (2), "row", "column" (2 or 3) and "background" (4). The order of
    objects is unchanged. A row or column that would put the object into, or past, the cell of another is left out, so
    that every choice is the complete caption of some scene and only the picture tells which: a captioner that knows
    that captions name objects cell by cell would reject the others blind. The object is drawn among those that leave a
    choice; where there is none the attribute is not asked. Chance is 1 / len(captions).

    Returns:
      [(attribute, captions, index of the true one)].
    """
    objects = scene.objects
    vocabularies = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
    questions: list[tuple[str, list[Scene], int]] = []
    for attribute in (*vocabularies, "row", "column"):
        field = attribute if attribute in vocabularies else "cell"
        if attribute in vocabularies:
            choices = {i: list(range(len(vocabularies[attribute]))) for i in range(len(objects))}
        else:
            moves = {i: _moves(objects, i, attribute) for i in range(len(objects))}
            choices = {i: cells for i, cells in moves.items() if len(cells) > 1}
        if choices:
            i = list(choices)[int(rng.integers(len(choices)))]
            changed = [dataclasses.replace(objects[i], **{field: value}) for value in choices[i]]
            scenes = [Scene(scene.background, (*objects[:i], o, *objects[i + 1 :])) for o in changed]
            questions.append((attribute, scenes, choices[i].index(getattr(objects[i], field))))
    grounds = [Scene(background, objects) for background in range(len(BACKGROUNDS))]
    questions.append(("background", grounds, scene.background))
    return [(attribute, [grammar.complete(s) for s in scenes], true) for attribute, scenes, true in questions]


def with_true_background(text: str, scene: Scene) -> str:
    """The caption with its background clause added or replaced by the true one.

    Of a malformed caption the leading well-formed objects (at most 4) are kept, the rest is dropped.
    """
    objects, _ = grammar.read_objects(grammar.split_words(text))
    return grammar.write(Description(objects, scene.background))


def background_only(scene: Scene) -> str:
    """The caption that names nothing but the true background."""
    return grammar.write(Description((), scene.background))


def attributes_grid(scene: Scene) -> dict[str, np.ndarray]:
    """Targets of an attribute classifier.

    Returns:
      "shape", "colour", "size": int32 [9] by cell, 0 for empty and 1 + index otherwise; "background": int32 [].
    """
    grid = {name: np.zeros(CELLS, np.int32) for name in ("shape", "colour", "size")}
    for o in scene.objects:
        for name, cells in grid.items():
            cells[o.cell] = 1 + getattr(o, name)
    return {**grid, "background": np.array(scene.background, np.int32)}
