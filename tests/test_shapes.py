"""The shapes world: scenes, pictures, grammar, automaton, tokenizer, facts."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from uae_jax.data.shapes import facts, grammar, render, tokenizer
from uae_jax.data.shapes.grammar import Description, Mention, parse
from uae_jax.data.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    sample_scene,
    split_seed,
)
from uae_jax.errors import UserError

TOKENIZER = tokenizer.build()
TRANSITIONS, ACCEPTING = grammar.automaton(TOKENIZER)
SCENES = [sample_scene(0, i) for i in range(300)]


def maybe(n):
    return st.none() | st.integers(0, n - 1)


mentions = st.builds(Mention, st.integers(0, 5), maybe(8), maybe(2), maybe(9))
descriptions = st.builds(Description, st.lists(mentions, max_size=4).map(tuple), maybe(4)).filter(
    lambda d: d.objects or d.background is not None
)
scenes = st.builds(sample_scene, st.integers(0, 9), st.integers(0, 10**6))


# ---- scenes ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 4))
def test_scenes_are_valid_and_a_function_of_seed_and_index(seed, index, max_objects):
    scene = sample_scene(seed, index, max_objects)
    assert scene == sample_scene(seed, index, max_objects)
    cells = [o.cell for o in scene.objects]
    assert 1 <= len(cells) <= max_objects and cells == sorted(set(cells))
    assert 0 <= scene.background < 4 and all(0 <= o.cell < 9 and o.cell == 3 * o.row + o.column for o in scene.objects)
    assert all(o.shape in range(6) and o.colour in range(8) and o.size in range(2) for o in scene.objects)


def test_scenes_are_uniform():
    drawn = [sample_scene(3, i) for i in range(4000)]
    for values, n in [
        ([len(s.objects) - 1 for s in drawn], 4),
        ([s.background for s in drawn], 4),
        ([o.cell for s in drawn for o in s.objects], 9),
        ([o.shape for s in drawn for o in s.objects], 6),
        ([o.colour for s in drawn for o in s.objects], 8),
        ([o.size for s in drawn for o in s.objects], 2),
    ]:
        share = np.bincount(values, minlength=n) / len(values)
        assert np.abs(share * n - 1).max() < 0.12


def test_seeds_and_splits_differ():
    seeds = [split_seed(seed, split) for seed in range(50) for split in SPLITS]
    assert len(set(seeds)) == len(seeds)
    streams = [[sample_scene(seed, i) for i in range(50)] for seed in seeds[:3]]
    assert all(sum(a == b for a, b in zip(x, y, strict=True)) < 3 for x, y in itertools.combinations(streams, 2))


def test_neighbouring_indices_and_seeds_give_other_scenes():
    assert len({sample_scene(seed, i) for seed in range(4) for i in range(250)}) > 970  # one-object scenes may recur


def test_object_limit_is_checked():
    for n in (0, 5):
        with pytest.raises(UserError, match="max_objects"):
            sample_scene(0, 0, n)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [12, 16])
def test_all_glyphs_differ_clearly(cell):
    masks = render.glyphs(cell).reshape(12, cell, cell)
    assert masks.min() >= 0 and masks.max() == 1
    area = masks.sum((1, 2))
    for i, j in itertools.combinations(range(12), 2):
        # Some tenth of the larger glyph's area is different ink, and never less than 7 pixels' worth.
        difference = np.abs(masks[i] - masks[j]).sum()
        assert difference > max(0.11 * max(area[i], area[j]), 7 * (cell / 16) ** 2), (i, j, difference)


def test_glyphs_are_mirror_images_and_do_not_touch_the_neighbours():
    masks = render.glyphs(16)
    np.testing.assert_array_equal(masks, masks[..., ::-1])
    border = np.concatenate([masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]], -1)
    assert border.max() <= 0.5


def test_colours_are_far_apart():
    colours = [np.array(c) for c in (*render.COLOUR_RGB.values(), *render.BACKGROUND_RGB.values())]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > 105
    assert set(render.COLOUR_RGB) == set(COLOURS) and set(render.BACKGROUND_RGB) == set(BACKGROUNDS)


@pytest.mark.parametrize("size", [36, 48])
def test_render_blends_glyphs_over_the_background(size):
    for scene in SCENES[:100]:
        image = render.render(scene, size)
        assert image.dtype == np.uint8 and image.shape == (size, size, 3)
        ground = np.array(render.BACKGROUND_RGB[BACKGROUNDS[scene.background]], float)
        expected = np.broadcast_to(ground, (size, size, 3)).copy()
        cell = size // 3
        for o in scene.objects:
            mask = render.glyphs(cell)[o.shape, o.size][..., None]
            y, x = cell * (o.cell // 3), cell * (o.cell % 3)
            colour = np.array(render.COLOUR_RGB[COLOURS[o.colour]], float)
            expected[y : y + cell, x : x + cell] = mask * colour + (1 - mask) * ground
        assert np.abs(image - expected).max() <= 0.5 + 1e-3


def test_pictures_are_fresh_and_sizes_checked():
    first = render.render(SCENES[0])
    first[:] = 7
    assert (render.render(SCENES[0]) != 7).any()
    for size in (0, -6, 33, 47):
        with pytest.raises(UserError, match="multiple of 6"):
            render.render(SCENES[0], size)


# ---- grammar ---------------------------------------------------------------------------------------------------------


def truth(scene):
    objects = tuple(Mention(o.shape, o.colour, o.size, o.cell) for o in scene.objects)
    return Description(objects, scene.background)


def test_complete_caption_by_hand():
    scene = Scene(0, (Object(0, 0, 0, 0), Object(5, 6, 1, 7)))
    assert grammar.complete(scene) == (
        "a small red circle top left and a large cyan ring bottom center on a black background"
    )
    assert grammar.describe(scene, [1], ["colour"], background=False) == "a cyan ring"
    assert grammar.describe(scene, [1, 0], [["size"], ["position"]]) == (
        "a large ring and a circle top left on a black background"
    )
    assert grammar.describe(scene, []) == "on a black background" == facts.background_only(scene)


@given(scenes)
def test_complete_captions_say_the_scene_exactly(scene):
    text = grammar.complete(scene)
    assert parse(text) == truth(scene)
    assert len(text.split(" ")) == 7 * len(scene.objects) + 3 <= 31


@given(descriptions)
def test_parse_inverts_write(description):
    assert parse(grammar.write(description)) == description


@given(scenes, st.data())
def test_parse_reads_what_describe_says(scene, data):
    order = data.draw(st.permutations(range(len(scene.objects))))
    chosen = order[: data.draw(st.integers(1, len(order)))]
    names = [data.draw(st.sets(st.sampled_from(grammar.OPTIONAL))) for _ in chosen]
    background = data.draw(st.booleans())
    said = parse(grammar.describe(scene, chosen, names, background))
    assert said is not None and said.background == (scene.background if background else None)
    for mention, i, kept in zip(said.objects, chosen, names, strict=True):
        o = scene.objects[i]
        assert mention == Mention(
            o.shape,
            o.colour if "colour" in kept else None,
            o.size if "size" in kept else None,
            o.cell if "position" in kept else None,
        )


def test_terse_and_partial_captions():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        said = parse(grammar.terse(scene, rng, 0.25))
        assert said is not None and len(said.objects) == 1 and said.background == scene.background
        assert grammar.terse(scene, rng, 1.0) == grammar.describe(scene, [striking(scene)])
        assert grammar.caption(scene, rng, 1.0) == grammar.complete(scene)
        bare = parse(grammar.caption(scene, rng, 0.0))
        assert bare is not None and [dataclass_values(m) for m in bare.objects] == [(None, None, None)]
    # Everything said is true, every length occurs, and the background is rarely dropped.
    texts = [(s, grammar.caption(s, rng, float(rng.random()))) for _ in range(10) for s in SCENES]
    said = [parse(text) for _, text in texts]
    assert rates(said, [s for s, _ in texts], "colour")[1] == 1.0
    assert rates(said, [s for s, _ in texts], "position")[1] == 1.0
    lengths = {len(text.split(" ")) for _, text in texts}
    assert lengths >= set(range(6, 32)) and min(lengths) == 2
    assert 0.01 < np.mean([d.background is None for d in said]) < 0.1
    tersely = [parse(grammar.terse(s, rng, 0.25)) for s in SCENES]
    for field in ("colour", "size", "cell"):
        assert 0.15 < np.mean([getattr(d.objects[0], field) is not None for d in tersely]) < 0.35


def striking(scene):
    """The first large object, or the first of all."""
    large = [i for i, o in enumerate(scene.objects) if SIZES[o.size] == "large"]
    return (large or [0])[0]


def dataclass_values(mention):
    return mention.colour, mention.size, mention.cell


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "a",
        "circle",
        "a red",
        "a circle top",
        "a circle left top",
        "a circle left",
        "a red small circle",
        "a red green circle",
        "A red circle",
        "a circle a square",
        "a circle and",
        "a circle and on a black background",
        "and a circle",
        "top a on a brown background",
        "a circle on a black",
        "a circle on black background",
        "a circle on a red background",
        "on a black background a circle",
        "a circle on a black background on a black background",
        "a circle\ton a black background",
        "a circle, a square",
        " and ".join(["a circle"] * 5),
    ],
)
def test_malformed(text):
    assert parse(text) is None
    assert not accepts(text)


@pytest.mark.parametrize(
    "text",
    ["a circle", "  a  circle ", "on a white background", "a circle top left and a circle top left", "a pink ring"],
)
def test_well_formed(text):
    assert parse(text) is not None
    assert accepts(text)


# ---- automaton and tokenizer -----------------------------------------------------------------------------------------


def accepts(text):
    state = 0
    for token in TOKENIZER.encode(text).ids:
        state = TRANSITIONS[state, token]
    return bool(ACCEPTING[state])


def test_automaton_shape():
    states, vocab = TRANSITIONS.shape
    assert TRANSITIONS.dtype == np.int32 and ACCEPTING.dtype == bool and ACCEPTING.shape == (states,)
    assert vocab == TOKENIZER.get_vocab_size() == 37
    assert (TRANSITIONS[-1] == states - 1).all() and not ACCEPTING[-1] and not ACCEPTING[0]
    assert (TRANSITIONS[:, : len(tokenizer.SPECIAL)] == states - 1).all()
    assert set(TRANSITIONS.ravel().tolist()) | {0} == set(range(states))  # no state is out of reach


words = st.sampled_from(grammar.WORDS)


@settings(max_examples=400)
@given(st.lists(words | st.sampled_from(["", "dog", "Red", "<|im_end|>", "a\tred", "\u2003"]), max_size=12))
def test_automaton_agrees_on_random_words(chosen):
    text = " ".join(chosen)
    assert accepts(text) == (parse(text) is not None)


@settings(max_examples=600)
@given(descriptions, st.data())
def test_automaton_agrees_on_mutated_captions(description, data):
    chosen = grammar.write(description).split(" ")
    for _ in range(data.draw(st.integers(0, 2))):
        i = data.draw(st.integers(0, len(chosen)))
        kind = data.draw(st.sampled_from(["insert", "replace", "delete", "cut", "repeat"]))
        cut = {
            "insert": [*chosen[:i], data.draw(words), *chosen[i:]],
            "replace": [*chosen[:i], data.draw(words), *chosen[i + 1 :]],
            "delete": [*chosen[:i], *chosen[i + 1 :]],
            "cut": chosen[:i],
            "repeat": [*chosen[:i], "and", *chosen],
        }
        chosen = cut[kind]
    text = " ".join(chosen)
    assert accepts(text) == (parse(text) is not None)


def test_automaton_agrees_on_every_short_caption():
    for n in (1, 2, 3):
        for chosen in itertools.product(("a", "and", "on", "small", "red", "ring", "top", "left", "gray"), repeat=n):
            text = " ".join(chosen)
            assert accepts(text) == (parse(text) is not None)


@given(descriptions)
def test_tokenizer_round_trip(description):
    text = grammar.write(description)
    encoded = TOKENIZER.encode(text)
    assert encoded.tokens == text.split(" ") and TOKENIZER.decode(encoded.ids) == text


def test_tokenizer_vocabulary_and_specials(tmp_path):
    encoded = TOKENIZER.encode("<|im_start|>a red circle<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "a", "red", "circle", "<|im_end|>"]
    assert TOKENIZER.decode(encoded.ids) == "a red circle"
    assert TOKENIZER.decode(encoded.ids, skip_special_tokens=False) == "<|im_start|> a red circle <|im_end|>"
    assert TOKENIZER.encode("<|vision_start|><|image_pad|><|image_pad|><|vision_end|>a").ids == [3, 5, 5, 4, 7]
    assert TOKENIZER.encode("a dog").tokens == ["a", "<|unk|>"]
    assert [TOKENIZER.id_to_token(i) for i in range(37)] == [*tokenizer.SPECIAL, *sorted(grammar.WORDS)]
    assert len({*SIZES, *COLOURS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS, "a", "and", "on", "background"}) == 30
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for scene in SCENES[:20]:
        text = f"<|im_start|>{grammar.complete(scene)}<|im_end|>"
        assert loaded.encode(text).ids == TOKENIZER.encode(text).ids


# ---- facts -----------------------------------------------------------------------------------------------------------

# A small red circle top left and a large blue square bottom right, on black.
SCENE = Scene(0, (Object(0, 0, 0, 0), Object(1, 2, 1, 8)))


def test_match_finds_the_best_assignment():
    assert facts.match(None, SCENE) == []
    assert facts.match(parse("on a black background"), SCENE) == []
    assert facts.match(parse("a blue square"), SCENE) == [1]
    assert facts.match(parse("a large square and a red circle"), SCENE) == [1, 0]
    # Alone, "a circle" fits object 0 best; the pair is better served when the second mention takes it.
    assert facts.match(parse("a circle and a small red circle top left"), SCENE) == [1, 0]
    assert facts.match(parse("a ring and a cross and a blue square bottom right"), SCENE) == [0, None, 1]


def rates(descriptions, scenes, category):
    """Recall and precision over all images."""
    shown, stated, right = facts.tallies(descriptions, scenes)[category].sum(0)
    return right / shown if shown else None, right / stated if stated else None


def test_tallies_by_hand():
    def found(text, category="all"):
        return rates([parse(text)], [SCENE], category)

    # 2 objects x 4 facts + count + background = 10 facts.
    assert found(grammar.complete(SCENE)) == (1.0, 1.0)
    # Right: circle, red. Wrong: count 1. Right: background. 3 of 4 stated.
    assert found("a red circle on a black background") == (3 / 10, 3 / 4)
    assert found("a red circle on a black background", "count") == (0.0, 0.0)
    assert found("a red circle on a black background", "background") == (1.0, 1.0)
    assert found("a red circle on a black background", "colour") == (1 / 2, 1.0)
    assert found("a red circle on a black background", "size") == (0.0, None)
    # The first object: circle right, green wrong, top left right; the second: square right, small wrong; count right.
    text = "a green circle top left and a small square"
    assert found(text) == (4 / 10, 4 / 6)
    assert found(text, "position") == (1 / 2, 1.0)
    assert found(text, "small_objects") == (2 / 4, 2 / 3)
    # A repeated object is left over: its two facts are wrong, and so is the count.
    text = "a red circle and a red circle and a blue square"
    assert found(text) == (4 / 10, 4 / 7)
    assert found("on a white background") == (0.0, 0.0)
    assert found("on a white background", "count") == (0.0, None)


def test_tallies_are_by_image_and_malformed_captions_state_nothing():
    one = Scene(2, (Object(5, 7, 1, 4),))  # a large pink ring middle center on white: 6 facts
    described = [parse(grammar.complete(one)), None], [one, SCENE]
    assert rates(*described, "all") == (6 / 16, 1.0)
    assert rates(*described, "small_objects") == (0.0, None)
    assert rates(*described, "shape") == (1 / 3, 1.0)
    by_image = facts.tallies(*described)
    assert set(by_image) == {"all", *facts.CATEGORIES}
    assert by_image["all"].tolist() == [[6, 6, 6], [10, 0, 0]]


@given(scenes, st.integers(0, 100))
def test_alternatives_are_fair(scene, seed):
    questions = facts.alternatives(scene, np.random.default_rng(seed))
    assert questions == facts.alternatives(scene, np.random.default_rng(seed))
    asked = [attribute for attribute, _, _ in questions]
    assert set(asked) >= {"shape", "colour", "size", "background"} and len(asked) == len(set(asked))
    size = {"shape": {6}, "colour": {8}, "size": {2}, "row": {2, 3}, "column": {2, 3}, "background": {4}}
    true_words = grammar.complete(scene).split(" ")
    for attribute, texts, true in questions:
        assert texts[true] == grammar.complete(scene)
        assert len(texts) in size[attribute] and len(set(texts)) == len(texts)
        for i, text in enumerate(texts):
            said = parse(text)
            assert said is not None
            cells = [o.cell for o in said.objects]
            assert cells == sorted(set(cells))  # the complete caption of some scene, in its own order
            differing = [a for a, b in zip(text.split(" "), true_words, strict=True) if a != b]
            assert len(differing) == (i != true)
            vocabularies = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "row": ROWS, "column": COLUMNS}
            assert set(differing) <= set({**vocabularies, "background": BACKGROUNDS}[attribute])


def test_alternatives_touch_every_object_and_hide_the_answer():
    scene = Scene(0, tuple(Object(k, k, k % 2, c) for k, c in enumerate((0, 2, 6, 8))))
    rng = np.random.default_rng(0)
    touched, places = set(), []
    for _ in range(60):
        _, texts, true = next(q for q in facts.alternatives(scene, rng) if q[0] == "shape")
        other = parse(texts[1 - min(true, 1)])
        touched |= {k for k in range(4) if other.objects[k].shape != scene.objects[k].shape}
        places.append(true)
    assert touched == {0, 1, 2, 3} and len(set(places)) == 4


def test_control_captions():
    def control(text):
        return facts.with_true_background(text, SCENE)

    assert control("a red circle") == "a red circle on a black background"
    assert control("a red circle on a white background") == "a red circle on a black background"
    assert control("a red circle top and a ring") == "a red circle on a black background"
    assert control("a ring and a red on a white background") == "a ring on a black background"
    assert control("top a on a brown background") == control("") == "on a black background"
    assert control(" and ".join(["a ring"] * 6)) == " and ".join(["a ring"] * 4) + " on a black background"


def test_attributes_grid():
    grid = facts.attributes_grid(SCENE)
    np.testing.assert_array_equal(grid["shape"], [1, 0, 0, 0, 0, 0, 0, 0, 2])
    np.testing.assert_array_equal(grid["colour"], [1, 0, 0, 0, 0, 0, 0, 0, 3])
    np.testing.assert_array_equal(grid["size"], [1, 0, 0, 0, 0, 0, 0, 0, 2])
    assert grid["background"] == 0 and grid["background"].shape == ()
