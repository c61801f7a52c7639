"""Contact sheets: every picture is in its place, enlarged without smoothing; captions never leave their column."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

from uae_jax import pictures
from uae_jax.errors import UserError

RED, GREEN, BLUE = [255, 0, 0], [0, 255, 0], [0, 0, 255]
WIDTH, PAD = pictures._NARROWEST, pictures._PAD


def flat(colour, height=4, width=6):
    return np.full((height, width, 3), colour, np.uint8)


def box(sheet, colour):
    """Top, bottom, left, right (exclusive) and the number of pixels of exactly this colour."""
    y, x = np.nonzero((sheet == colour).all(-1))
    return y.min(), y.max() + 1, x.min(), x.max() + 1, len(y)


def test_each_picture_is_enlarged_whole_in_its_row_and_column():
    sheet = pictures.grid(
        [[flat(RED), flat(GREEN)], [flat(BLUE, 8, 2), None]], [["", ""], ["", ""]], ["source", "best"], scale=10
    )
    boxes = {name: box(sheet, colour) for name, colour in (("red", RED), ("green", GREEN), ("blue", BLUE))}
    for name, (height, width) in {"red": (40, 60), "green": (40, 60), "blue": (80, 20)}.items():
        top, bottom, left, right, count = boxes[name]
        assert (bottom - top, right - left, count) == (height, width, height * width), name
    assert boxes["red"][0] == boxes["green"][0] and boxes["red"][2] == boxes["blue"][2]
    assert boxes["green"][2] == boxes["red"][2] + WIDTH + PAD and boxes["blue"][0] > boxes["red"][1]


def test_every_pixel_becomes_a_square():
    picture = np.random.default_rng(0).integers(0, 250, (5, 7, 3), np.uint8)
    sheet = pictures.grid([[picture]], [[""]], [""], scale=3)
    found = np.lib.stride_tricks.sliding_window_view(sheet, (15, 21, 3)).reshape(-1, 15, 21, 3)
    assert (found == np.kron(picture, np.ones((3, 3, 1), np.uint8))).all((1, 2, 3)).sum() == 1


def test_floats_and_bytes_make_the_same_sheet():
    values = np.array([[[0.0, 0.5, 1.0], [-1.0, 2.0, np.nan]]], np.float32)
    expected = np.array([[[0, 128, 255], [0, 255, 0]]], np.uint8)
    np.testing.assert_array_equal(pictures.to_uint8(values), expected)
    np.testing.assert_array_equal(pictures.to_uint8(jnp.asarray(values, jnp.bfloat16)), expected)
    np.testing.assert_array_equal(pictures.to_uint8(expected), expected)


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 1)), np.zeros((4, 4, 3), np.int32)])
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(ValueError, match="a picture is"):
        pictures.to_uint8(bad)


@pytest.mark.parametrize("text", ["a small red circle left of a large blue square", "x" * 90, "é 漢字 " * 12])
def test_wrapped_lines_fit_and_lose_no_letter(text):
    font = ImageFont.load_default(size=13)
    lines = pictures.wrap(text, font, 100)
    assert len(lines) > 1 and all(font.getlength(line) <= 100 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert pictures.wrap("", font, 100) == []


def test_a_long_caption_makes_its_row_taller_and_stays_in_its_column():
    short = pictures.grid([[flat(RED)] * 2], [["a", ""]], ["", ""], scale=4)
    long = pictures.grid([[flat(RED)] * 2], [["many words " * 12, ""]], ["", ""], scale=4)
    assert long.shape[0] > short.shape[0] and long.shape[1] == short.shape[1]
    below = long[pictures._PAD * 3 + 16 :]
    ink = np.nonzero((below < 128).all(-1))
    assert ink[1].min() >= PAD and ink[1].max() < PAD + WIDTH
    assert ink[0].max() < below.shape[0] - 1


def test_rows_that_do_not_match_the_headers_are_refused():
    with pytest.raises(ValueError, match="rows must be 1 x 2"):
        pictures.grid([[flat(RED)]], [["", ""]], ["a", "b"], scale=1)
    with pytest.raises(ValueError, match="captions must be 1 x 1"):
        pictures.grid([[flat(RED)]], [], ["a"], scale=1)


def test_png_round_trip_and_a_path_below_a_file(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    pictures.save_png(tmp_path / "deep" / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "deep" / "a.png")), picture)
    with pytest.raises(UserError, match=r"a\.png/b\.png: Not a directory"):
        pictures.save_png(tmp_path / "deep" / "a.png" / "b.png", picture)
