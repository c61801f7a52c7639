"""Captions of the shapes world: writing them, reading them, and a finite automaton that tells well-formed ones.

    caption    = objects [background] | background
    objects    = object {"and" object}                                at most 4
    object     = "a" ["small"|"large"] [colour] shape [row column]
    background = "on a" ("black"|"gray"|"white"|"brown") "background"

Words are lower case and separated by spaces (repeated, leading and trailing ones are ignored). Decided: the empty
caption says nothing and is malformed; the background alone is well-formed; more than four objects are malformed, for
no scene has them; an object that repeats another, or stands in the cell of another, is well-formed (and wrong).
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import tokenizers

from uae_jax.data.shapes.scene import BACKGROUNDS, COLOURS, COLUMNS, GRID, MAX_OBJECTS, ROWS, SHAPES, SIZES, Scene

OPTIONAL = ("size", "colour", "position")  # of an object; its shape is always named
WORDS = tuple(sorted({"a", "and", "on", "background", *SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS}))
# Words of the longest caption: 6 an object, "and" between them, "on a ... background".
LONGEST = 7 * MAX_OBJECTS + 3


@dataclasses.dataclass(frozen=True)
class Mention:
    """What a caption says of one object, as indices; None is unsaid. The cell is 3 * row + column."""

    shape: int
    colour: int | None = None
    size: int | None = None
    cell: int | None = None


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption says: its objects in the order named, and the background (None: unsaid)."""

    objects: tuple[Mention, ...]
    background: int | None = None


def write(description: Description) -> str:
    """The caption that says this; inverse of `parse` on well-formed descriptions."""
    phrases = []
    for o in description.objects:
        words = ["a"]
        words += [SIZES[o.size]] if o.size is not None else []
        words += [COLOURS[o.colour]] if o.colour is not None else []
        words += [SHAPES[o.shape]]
        words += [ROWS[o.cell // GRID], COLUMNS[o.cell % GRID]] if o.cell is not None else []
        phrases.append(" ".join(words))
    text = " and ".join(phrases)
    if description.background is not None:
        text += f" on a {BACKGROUNDS[description.background]} background"
    return text.strip()


def describe(
    scene: Scene,
    objects: Sequence[int] | None = None,
    attributes: Collection[str] | Sequence[Collection[str]] = OPTIONAL,
    background: bool = True,
) -> str:
    """A true caption of the scene.

    Args:
      scene: what is described.
      objects: which of `scene.objects` are named, and in which order; default all, by cell.
      attributes: the subset of `OPTIONAL` that is said of every object, or one such subset for each named object.
      background: whether the background is named.
    """
    chosen = range(len(scene.objects)) if objects is None else objects
    said = [attributes] * len(chosen) if all(isinstance(a, str) for a in attributes) else attributes
    mentions = []
    for i, names in zip(chosen, said, strict=True):
        o = scene.objects[i]
        mentions.append(
            Mention(
                o.shape,
                o.colour if "colour" in names else None,
                o.size if "size" in names else None,
                o.cell if "position" in names else None,
            )
        )
    return write(Description(tuple(mentions), scene.background if background else None))


def complete(scene: Scene) -> str:
    """The caption that says everything, objects by cell: 6 n + (n - 1) + 4 words for n objects, at most 31."""
    return describe(scene)


def terse(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    """The object that strikes first (a large one before small ones, then by cell) and the background.

    Its shape is named always, each further attribute with probability `detail`.
    """
    striking = max(range(len(scene.objects)), key=lambda i: scene.objects[i].size)
    names = [name for name in OPTIONAL if rng.random() < detail]
    return describe(scene, [striking], names)


def caption(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    """A true caption of random length: `detail` 0 names one bare shape, 1 is `complete`.

    Objects beyond the first (a random one) and attributes are each kept with probability `detail`; the background is
    dropped with probability (1 - detail) / 10. Objects are named by cell.
    """
    order = rng.permutation(len(scene.objects))
    kept = sorted(int(i) for n, i in enumerate(order) if n == 0 or rng.random() < detail)
    names = [[name for name in OPTIONAL if rng.random() < detail] for _ in kept]
    return describe(scene, kept, names, background=rng.random() >= (1 - detail) / 10)


def read_objects(words: Sequence[str]) -> tuple[tuple[Mention, ...], int]:
    """The longest leading list of at most 4 objects, and how many words it takes (0 for none)."""

    def index(vocabulary: tuple[str, ...], at: int) -> int | None:
        return vocabulary.index(words[at]) if at < len(words) and words[at] in vocabulary else None

    mentions: list[Mention] = []
    end = 0
    while len(mentions) < MAX_OBJECTS:
        at = end
        if mentions:
            if words[at : at + 1] != ["and"]:
                break
            at += 1
        if words[at : at + 1] != ["a"]:
            break
        at += 1
        size = index(SIZES, at)
        at += size is not None
        colour = index(COLOURS, at)
        at += colour is not None
        shape = index(SHAPES, at)
        if shape is None:
            break
        at += 1
        row, column = index(ROWS, at), index(COLUMNS, at + 1)
        cell = None if row is None or column is None else GRID * row + column
        end = at if cell is None else at + 2
        mentions.append(Mention(shape, colour, size, cell))
    return tuple(mentions), end


def split_words(text: str) -> list[str]:
    """The words of a caption; only the space separates, as in the tokenizer."""
    return [word for word in text.split(" ") if word]


def parse(text: str) -> Description | None:
    """What a caption says, or None if it is malformed (see the module's grammar)."""
    words = split_words(text)
    objects, end = read_objects(words)
    rest = words[end:]
    if not rest:
        return Description(objects) if objects else None
    if len(rest) == 4 and rest[:2] == ["on", "a"] and rest[2] in BACKGROUNDS and rest[3] == "background":
        return Description(objects, BACKGROUNDS.index(rest[2]))
    return None


def automaton(tokenizer: tokenizers.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """A deterministic automaton over token ids that accepts what `parse` accepts.

    Run it over the ids of the caption alone, without the end-of-caption token: special tokens lead to the dead state.

    Returns:
      transitions: int32 [states, vocab], the next state; state 0 is the start, the last state is dead (absorbing).
      accepting: bool [states].
    """
    edges: list[tuple[str, Collection[str], str]] = [("start", ["a"], "a 0"), ("start", ["on"], "on")]
    for k in range(MAX_OBJECTS):
        edges += [(f"a {k}", SIZES, f"size {k}")]
        edges += [(f"{state} {k}", COLOURS, f"colour {k}") for state in ("a", "size")]
        edges += [(f"{state} {k}", SHAPES, f"shape {k}") for state in ("a", "size", "colour")]
        edges += [(f"shape {k}", ROWS, f"row {k}"), (f"row {k}", COLUMNS, f"column {k}")]
        for state in (f"shape {k}", f"column {k}"):
            edges += [(state, ["on"], "on")]
            edges += [(state, ["and"], f"and {k + 1}")] if k + 1 < MAX_OBJECTS else []
        edges += [(f"and {k}", ["a"], f"a {k}")] if k else []
    edges += [("on", ["a"], "on a"), ("on a", BACKGROUNDS, "ground"), ("ground", ["background"], "done")]

    names = [*dict.fromkeys(state for edge in edges for state in (edge[0], edge[2])), "dead"]
    number = {name: i for i, name in enumerate(names)}
    transitions = np.full((len(names), tokenizer.get_vocab_size()), number["dead"], np.int32)
    for source, words, target in edges:
        for word in words:
            transitions[number[source], tokenizer.token_to_id(word)] = number[target]
    accepting = np.array([name.split(" ")[0] in ("shape", "column", "done") for name in names])
    return transitions, accepting
