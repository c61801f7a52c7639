"""Image files, sources, splits, batches and prefetching."""

import itertools
import logging
import threading

import numpy as np
import pytest
from PIL import Image, ImageSequence

from uae_jax.data import images, records, sources
from uae_jax.data.shapes import render, scene
from uae_jax.errors import UserError

GRADIENT = np.stack([*np.meshgrid(np.arange(0, 256, 4), np.arange(0, 256, 8)), np.full((32, 64), 60)], -1)
GRADIENT = GRADIENT.astype(np.uint8)  # 32 high, 64 wide


def write(path, array=GRADIENT, **options):
    Image.fromarray(array).save(path, **options)
    return path


def folder(tmp_path, n):
    for i in range(n):
        write(tmp_path / f"{i:02d}.png", np.full((20, 30, 3), 10 * i, np.uint8))
    return tmp_path


# ---- load_image and fit ----------------------------------------------------------------------------------------------


def test_plain_formats(tmp_path):
    for name in ("a.png", "a.bmp"):
        np.testing.assert_array_equal(np.asarray(images.load_image(write(tmp_path / name))), GRADIENT)
    for name in ("a.jpg", "a.webp"):
        loaded = np.asarray(images.load_image(write(tmp_path / name, quality=95)), int)
        assert np.abs(loaded - GRADIENT).mean() < 6


def test_greyscale_and_16_bit(tmp_path):
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    eight = np.round(ramp / 257).astype(np.uint8)
    for path in (write(tmp_path / "16.png", ramp), write(tmp_path / "8.png", eight)):
        loaded = images.load_image(path)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.repeat(eight[..., None], 3, -1))
    one = images.load_image(write(tmp_path / "1.png", ramp > 30000))
    np.testing.assert_array_equal(np.asarray(one)[..., 0], (ramp > 30000) * 255)


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    assert np.abs(np.asarray(images.load_image(tmp_path / "red.jpg"), int) - (255, 0, 0)).max() < 12


def test_alpha_is_laid_over_white(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3], rgba[2, :, 3] = 200, 255, 51
    loaded = np.asarray(images.load_image(write(tmp_path / "rgba.png", rgba)), int)
    assert (loaded[0] == (200, 0, 0)).all() and (loaded[3] == 255).all()
    assert np.abs(loaded[2] - (244, 204, 204)).max() <= 1  # .2 of red, .8 of white
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    palette.putpalette([0, 0, 255, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=1)
    expected = np.array([[[0, 0, 255], [255] * 3], [[255] * 3, [0, 0, 255]]])
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "p.png")), expected)
    grey = np.dstack([np.full((2, 2), 100, np.uint8), np.array([[255, 0], [0, 255]], np.uint8)])
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "la.png"))[..., 1], [[100, 255], [255, 100]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned left; shown turned right
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(GRADIENT)
    if orientation in turn:
        stored = stored.transpose(turn[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(images.load_image(tmp_path / "turned.png")), GRADIENT)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        with Image.open(tmp_path / name) as image:
            assert len(list(ImageSequence.Iterator(image))) == 3
        assert (np.asarray(images.load_image(tmp_path / name)) == (255, 0, 0)).all()


def broken(tmp_path):
    whole = write(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).read_bytes()
    png = write(tmp_path / "whole.png").read_bytes()
    (tmp_path / "whole.jpg").unlink(), (tmp_path / "whole.png").unlink()
    files = {
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": png[: len(png) // 2],
        "flipped.png": png[:60] + bytes(b ^ 255 for b in png[60:90]) + png[90:],
        "text.png": b"this is no picture\n",
        "empty.webp": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return list(files)


def test_broken_files_raise_bad_image(tmp_path):
    for name in [*broken(tmp_path), "missing.png"]:
        with pytest.raises(images.BadImage) as caught:
            images.load_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name) and caught.value.reason
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("limit", [2047, 1000])  # PIL itself only warns up to twice its limit
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs(tmp_path, monkeypatch, limit):
    path = write(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(images.BadImage, match="limit"):
        images.load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2048)
    images.load_image(path)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (50, 50), (96, 32), (32, 128)])
def test_fit_is_resize_then_centre_crop(shape):
    # Mid-range noise: PIL's first pass would clip the overshoot of stronger contrasts, the exact reference does not.
    pixels = np.random.default_rng(0).integers(70, 185, (*shape, 3), np.uint8)
    got = images.fit(Image.fromarray(pixels), 16)
    assert got.shape == (16, 16, 3) and got.dtype == np.uint8
    width, height = (16 * shape[1] // min(shape), 16 * shape[0] // min(shape))
    top, left = (height - 16) // 2, (width - 16) // 2
    for channel in range(3):
        exact = Image.fromarray(pixels[..., channel].astype(np.float32))
        whole = np.asarray(exact.resize((width, height), Image.Resampling.BICUBIC))
        # PIL rounds to 8 bits after each of its two passes: .5, and .5 times the sum of absolute weights (below 1.3).
        assert np.abs(got[..., channel] - whole[top : top + 16, left : left + 16]).max() <= 1.15


def test_fit_is_antialiased_centred_and_thrifty():
    checks = np.indices((160, 160)).sum(0) % 2 * 255
    assert (
        np.abs(images.fit(Image.fromarray(np.stack([checks] * 3, -1).astype(np.uint8)), 16).astype(int) - 127).max() < 4
    )
    wide = np.zeros((20, 100, 3), np.uint8)
    wide[:, 40:60] = 255
    assert (images.fit(Image.fromarray(wide), 10)[:, 1:-1] > 240).all()
    assert images.fit(Image.new("RGB", (60_000, 1), "red"), 48).shape == (48, 48, 3)
    np.testing.assert_array_equal(images.fit(Image.fromarray(GRADIENT[:, 16:48]), 32), GRADIENT[:, 16:48])


# ---- sources ---------------------------------------------------------------------------------------------------------


def test_shapes_source():
    source = sources.ShapesSource(seed=4, size=10, image_size=36, max_objects=2)
    assert len(source) == 10
    for i in range(10):
        item = source[i]
        assert item["scene"] == scene.sample_scene(4, i, 2) and len(item["scene"].objects) <= 2
        np.testing.assert_array_equal(item["image"], render.render(item["scene"], 36))
    for i in (-1, 10):
        with pytest.raises(IndexError):
            source[i]


def test_a_folder_is_listed_sorted_and_its_pictures_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    good = ["B.JPG", "a.jpeg", "sub/c.PNG", "sub/d.gif", "z.bmp"]
    for i, name in enumerate(good):
        write(tmp_path / name, np.full((20, 30, 3), 40 * i, np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    found = records.read_folder(tmp_path)
    assert [pair.name for pair in found] == sorted(good) and {pair.caption for pair in found} == {""}
    source = sources.Pictures(found, 24)
    for i, pair in enumerate(found):
        item = source[i]
        assert item["image"].shape == (24, 24, 3) and item["image"].dtype == np.uint8
        np.testing.assert_allclose(item["image"], 40 * good.index(pair.name), atol=3)
    for i in (-1, 5):
        with pytest.raises(IndexError):
            source[i]


def test_pictures_stay_in_memory_while_they_are_few(tmp_path, monkeypatch):
    found = records.read_folder(folder(tmp_path, 4))
    eager = sources.Pictures(found, 24)
    monkeypatch.setattr(sources, "KEEP_BYTES", 4 * 24 * 24 * 3)
    lazy = sources.Pictures(found, 24)
    for i in range(4):
        np.testing.assert_array_equal(eager[i]["image"], lazy[i]["image"])
    found[2].image.unlink()
    eager[2]  # kept in memory
    with pytest.raises(images.BadImage, match=r"02\.png"):
        lazy[2]


def test_what_is_no_folder_of_pictures(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        records.read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="none of 0 files"):
        records.read_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match="none of 1 files"):
        records.read_folder(tmp_path)
    for i in range(7):
        (tmp_path / f"{i}.png").write_text("no picture")
    source = sources.Pictures(records.read_folder(tmp_path), 24)
    with pytest.raises(UserError, match=r"none of the 7 pictures .*\.png \(not an image\).* and 2 more") as caught:
        sources.batches(source, range(7), 2, seed=0)[0]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 11, 100])
@pytest.mark.parametrize("held_out", [1, 2, 3, 16])
def test_split_is_disjoint_and_spread(n, held_out):
    train, held = sources.split(range(n), held_out)
    assert sorted(train + held) == list(range(n))
    assert 1 <= len(held) == min(held_out, n // 4)
    assert len({b - a for a, b in itertools.pairwise(held)}) <= 1


def test_split_of_very_few_images_warns(caplog):
    for n in (1, 3):
        with caplog.at_level(logging.WARNING):
            assert sources.split(range(n), 1) == (list(range(n)), list(range(n)))
        assert f"only {n} images" in caplog.text
    with pytest.raises(UserError, match="held_out"):
        sources.split(range(9), 0)


# ---- batches and prefetch --------------------------------------------------------------------------------------------


SOURCE = sources.ShapesSource(0, 50, 12)


def test_batches_hold_the_images_of_their_indices():
    ds = sources.batches(SOURCE, range(10, 30), 6, seed=1)
    batch = ds[3]
    assert batch["image"].shape == (6, 12, 12, 3) and batch["image"].dtype == np.uint8
    assert batch["index"].shape == (6,) and batch["index"].dtype == np.int32
    for image, index in zip(batch["image"], batch["index"], strict=True):
        assert 10 <= index < 30
        np.testing.assert_array_equal(image, SOURCE[int(index)]["image"])


@pytest.mark.parametrize(("n", "size"), [(20, 5), (20, 6), (7, 3), (3, 8), (1, 4)])
def test_every_epoch_covers_every_index_once(n, size):
    indices = list(range(2, 2 + n))
    ds = sources.batches(SOURCE, indices, size, seed=0)
    steps = -(-3 * n // size)
    order = np.concatenate([ds[step]["index"] for step in range(steps)])
    assert len(order) == steps * size
    epochs = [order[e * n : (e + 1) * n].tolist() for e in range(3)]
    assert all(sorted(epoch) == indices for epoch in epochs)
    if n >= 7:
        assert epochs[0] != indices and epochs[0] != epochs[1] != epochs[2]


def test_batches_are_a_function_of_seed_and_step():
    forward = sources.batches(SOURCE, range(50), 8, seed=5)
    steps = [0, 1, 2, 9, 40, 10**6]
    first = {step: forward[step]["index"] for step in steps}
    backward = sources.batches(SOURCE, range(50), 8, seed=5)
    for step in reversed(steps):
        np.testing.assert_array_equal(backward[step]["index"], first[step])
        np.testing.assert_array_equal(forward[step]["index"], first[step])
    other = np.concatenate([sources.batches(SOURCE, range(50), 50, seed=6)[e]["index"] for e in range(3)])
    mine = np.concatenate([sources.batches(SOURCE, range(50), 50, seed=5)[e]["index"] for e in range(3)])
    # Neither the same order, nor the same order one epoch later.
    assert (other != mine).any() and (other[:100] != mine[50:]).any()


def test_batches_of_nothing():
    for indices, size in (([], 4), (range(5), 0)):
        with pytest.raises(UserError, match="batches"):
            sources.batches(SOURCE, indices, size, seed=0)


class Recorder:
    """Stands in for a dataset: notes which steps were read, by which thread; fails at one of them."""

    def __init__(self, fail_at=None):
        self.steps, self.threads, self.fail_at = [], set(), fail_at
        self.arrived = threading.Condition()

    tally = None

    def read(self, step, rows):
        with self.arrived:
            self.steps.append(step)
            self.threads.add(threading.current_thread())
            self.arrived.notify_all()
        if step == self.fail_at:
            raise OSError(f"step {step}")
        return {"step": step}, []

    def wait_for(self, count):
        with self.arrived:
            return self.arrived.wait_for(lambda: len(self.steps) >= count, timeout=5)


def no_threads():
    return not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_yields_in_order_and_stays_two_ahead():
    ds = Recorder()
    stream = sources.prefetch(ds, 3, 9)
    assert ds.steps == []  # nothing starts before it is asked for
    assert next(stream) == {"step": 3}
    assert ds.wait_for(3) and ds.steps == [3, 4, 5]  # two ahead, and no further
    assert [item["step"] for item in stream] == [4, 5, 6, 7, 8]
    assert ds.steps == [3, 4, 5, 6, 7, 8] and threading.current_thread() not in ds.threads
    assert no_threads()
    assert list(sources.prefetch(ds, 4, 4)) == [] and no_threads()


def test_prefetch_stops_when_closed_or_when_the_consumer_raises():
    ds = Recorder()
    stream = sources.prefetch(ds, 0, 10**9)
    next(stream)
    stream.close()
    assert len(ds.steps) <= 3 and no_threads()
    with pytest.raises(KeyError):
        for _ in (stream := sources.prefetch(Recorder(), 0, 10**9)):
            raise KeyError
    stream.close()
    assert no_threads()


def test_prefetch_passes_errors_on():
    stream = sources.prefetch(Recorder(fail_at=2), 0, 9)
    assert [next(stream)["step"], next(stream)["step"]] == [0, 1]
    with pytest.raises(OSError, match="step 2"):
        next(stream)
    assert no_threads()


def test_prefetch_equals_random_access():
    ds = sources.batches(SOURCE, range(50), 8, seed=5)
    for step, batch in enumerate(sources.prefetch(ds, 7, 12), start=7):
        np.testing.assert_array_equal(batch["index"], ds[step]["index"])
