"""Whatever stands in a file, a config or a caption: it is read, or refused in one line.

`--run-slow` loads 10,000 damaged pictures and 1,000 damaged files of weights and of shards, in place of 200 and 50.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from uae_jax import config as configs
from uae_jax.convert import files, folder
from uae_jax.data import images, records, text
from uae_jax.data.shapes import grammar, scene
from uae_jax.data.shapes import tokenizer as shapes_tokenizer
from uae_jax.errors import UserError
from uae_jax.printable import printable

PROC = Path("/proc/self/clear_refs").exists()
MIB = 256  # that loading damaged files may take


def load_damaged(kind, count, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", kind, str(count)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, f"exit status {done.returncode}; the end of the output: {done.stderr[-2000:]}"
    result = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{kind}, damaged: {result}")
    assert result["files"] == count and result["read"] > 0 and result["refused"] > count / 4
    assert result["grown_mib"] < MIB


@pytest.mark.skipif(not PROC, reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("kind, count", [("images", 200), ("weights", 50), ("records", 50)])
def test_damaged_files_are_read_or_refused(kind, count, capsys):
    load_damaged(kind, count, capsys)


@pytest.mark.slow
@pytest.mark.skipif(not PROC, reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("kind, count", [("images", 10_000), ("weights", 1000), ("records", 1000)])
def test_many_damaged_files_are_read_or_refused(kind, count, capsys):
    load_damaged(kind, count, capsys)


# ---- configs ---------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 0.5]))
WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "rl", "decoder", "mixture", "folder", "jsonl", "a{99999999999}", "(" * 300, "[", "\0"]),
)
VALUES = st.one_of(NUMBERS, WORDS, st.booleans(), st.none(), st.lists(NUMBERS, max_size=2))
PARTS = st.dictionaries(
    st.text(st.characters(exclude_characters="."), min_size=1, max_size=3),
    st.one_of(VALUES, st.fixed_dictionaries({"source": WORDS, "path": VALUES, "weight": VALUES})),
    max_size=2,
)


def fields(c, prefix=""):
    for name, value in c.items():
        yield f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{name}.")


def full():
    c = configs.default().unlock()
    c.decoder = configs.decoder()
    return c


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_config_passes_or_is_refused_in_one_line(data):
    c = full()
    c.stage = data.draw(st.sampled_from(["rl", "decoder", "tower,rl"]))
    for field in data.draw(st.lists(st.sampled_from(sorted(fields(full()))), max_size=4)):
        *parents, leaf = field.split(".")
        node = c
        for parent in parents:
            node = node.get(parent) if isinstance(node, ConfigDict) else None
        if not isinstance(node, ConfigDict) or leaf not in node:
            continue
        value = data.draw(PARTS if isinstance(node[leaf], ConfigDict) else VALUES)
        try:
            node[leaf] = ConfigDict(value) if isinstance(value, dict) else value
        except TypeError:  # the ConfigDict's own refusal, of a value of another type
            continue
    try:
        configs.validate(c)
    except UserError as error:
        assert "\n" not in printable(error)


# ---- captions and tokenizers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    """A byte-level BPE as Qwen's, trained on a few captions."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    lines = [grammar.complete(scene.sample_scene(0, i)) for i in range(50)]
    found.train_from_iterator(lines, trainer)
    return found


CAPTIONS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(captions=st.lists(CAPTIONS, min_size=1, max_size=4))
@example(captions=["a\u2028b\r\n", "\x1b[2J", "\0", "e\u0301\u202e", "😀🏽", " " * 30])
def test_any_caption_survives_a_byte_level_tokenizer(words, captions):
    end = words.get_vocab_size()
    room = max(len(caption.encode()) for caption in captions) + 1
    ids, mask = text.encode_captions(words, captions, room, end)
    assert ids.shape == mask.shape == (len(captions), room) and (ids[~mask] == end).all()
    assert ((ids == end) & mask).sum() == len(captions)
    assert text.decode_captions(words, np.where(ids == end, 0, ids), mask & (ids != end)) == captions
    assert not text.retokenised(words, ids, mask, end).any()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), index=st.integers(0, 10**6))
def test_a_scene_survives_its_caption(seed, index):
    drawn = scene.sample_scene(seed, index)
    caption = grammar.complete(drawn)
    tokenizer = shapes_tokenizer.build()
    ids, mask = text.encode_captions(tokenizer, [caption], grammar.LONGEST + 1, 0)
    assert text.decode_captions(tokenizer, ids, mask) == [caption]
    found = grammar.parse(caption)
    assert found is not None and grammar.write(found) == caption and len(found.objects) == len(drawn.objects)


@settings(max_examples=200, deadline=None)
@given(caption=st.text(max_size=30))
def test_no_words_break_the_grammar(caption):
    ids, mask = text.encode_captions(shapes_tokenizer.build(), [caption], 60, 0)
    assert ids.max() < shapes_tokenizer.build().get_vocab_size() and mask.any()
    assert grammar.parse(caption) is None or grammar.write(grammar.parse(caption)) == caption


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=12), caption=st.text(max_size=30), image=st.binary(max_size=20))
@example(name="\udc80.png", caption="", image=b"")
@example(name="x", caption="\ud800", image=b"")
def test_records_survive_a_shard(name, caption, image):
    record = records.pack(name, caption, image)
    try:
        caption.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="surrogates"):
            records.unpack(record)
        return
    assert records.unpack(record) == (image, caption, name)


@settings(max_examples=200, deadline=None)
@given(name=st.text(), reason=st.text())
@example(name="\x1b]0;x\x07\u202e.png", reason="a\nb\r\u2028")
def test_what_is_printed_of_a_name_steers_no_terminal(name, reason):
    assert str(images.BadImage(name, reason)).isprintable()


# ---- headers ---------------------------------------------------------------------------------------------------------

SIDES = st.one_of(
    st.integers(0, 40), st.integers(100, 200), st.sampled_from([2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
)
BYTE = st.integers(0, 255)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def headers(draw):
    """Beginnings of pictures that promise anything, with little behind them."""
    width, height = draw(SIDES), draw(SIDES)
    rest = draw(st.binary(max_size=64))
    kind = draw(st.sampled_from(["png", "bmp", "gif", "ppm", "tiff"]))
    if kind == "png":
        depth, colour = draw(st.sampled_from([1, 2, 4, 8, 16, 3])), draw(st.sampled_from([0, 2, 3, 4, 6, 5]))
        start = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, draw(st.integers(0, 1)))
        body = chunk(draw(st.sampled_from([b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"zTXt"])), rest)
        rows = rest + bytes(min(height * (8 * width + 1), 10**6))  # little that becomes much
        body += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + body
    if kind == "bmp":
        sizes = struct.pack("<IIIHHIIIIII", 40, width, height, 1, draw(st.sampled_from([1, 4, 8, 16, 24, 32, 7])),
                            draw(st.integers(0, 6)), 0, 0, 0, draw(SIDES), 0)  # fmt: skip
        begin = draw(st.sampled_from([54, 0, 60, 2**31]))
        return b"BM" + struct.pack("<IHHI", 54 + len(rest), 0, 0, begin) + sizes + rest
    if kind == "gif":
        size = struct.pack("<HHBBB", width & 0xFFFF, height & 0xFFFF, draw(BYTE), draw(BYTE), 0)
        frame = b"," + struct.pack("<HHHHB", 0, 0, width & 0xFFFF, height & 0xFFFF, draw(BYTE)) + bytes([draw(BYTE)])
        return b"GIF89a" + size + rest + frame + rest + b"\0;"
    if kind == "ppm":
        return b"P%d %d %d %d\n" % (draw(st.integers(1, 6)), width, height, draw(st.integers(0, 70000))) + rest
    tags = {256: width, 257: height, 258: draw(st.integers(0, 64)), 259: draw(st.sampled_from([1, 2, 5, 7, 8, 32773])),
            262: draw(st.integers(0, 8)), 273: 8, 277: draw(SIDES), 278: draw(SIDES), 279: draw(SIDES)}  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + rest


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400, deadline=None)
@given(content=headers())
@example(content=b"P5 101 100 255\n" + bytes(101 * 100))
def test_a_header_promises_no_more_than_the_limits(content):
    limits = images.Limits(max_pixels=10_000)
    try:
        found = images.load_image(content, limits, "x")
    except images.BadImage as error:
        assert "\n" not in str(error) and "MemoryError" not in str(error)
    else:
        assert found.mode == "RGB" and found.width * found.height <= 10_000


def test_such_headers_are_those_of_pictures():
    """... or the test above would pass on anything."""
    for form in ("png", "bmp", "gif", "ppm", "tiff"):
        out = io.BytesIO()
        Image.new("L" if form == "gif" else "RGB", (3, 2)).save(out, form)
        assert images.load_image(out.getvalue()).size == (3, 2)
        with pytest.raises(images.BadImage, match="exceeds the limit of 5 pixels"):
            images.load_image(out.getvalue(), images.Limits(max_pixels=5))


# ---- what damaged files have taught ----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"caption": "\ud800"}, {"image": "\0"}, {"image": "\ud800"}, {"image": 3}])
def test_lines_that_name_no_picture_or_caption(tmp_path, changes):
    line = {"image": "a.png", "caption": "text"} | changes
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": line["image"], "caption": line["caption"]}))
    for read in (lambda: records.read_pairs(tmp_path / "x.jsonl"), lambda: records.read_folder(tmp_path)):
        with pytest.raises(UserError, match="line 1: expected"):
            read()


def test_what_is_damaged_is_named(tmp_path):
    source = folder.shipped("tiny") / "clip"
    raw = json.loads((source / "config.json").read_text())
    os.symlink(source / "model.safetensors", tmp_path / "model.safetensors")

    def refused(content, said):
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=said) as caught:
            folder.open_model(tmp_path)
        assert "config.json" in str(caught.value) and "\n" not in str(caught.value)

    vision = raw["vision_config"]
    refused("[" * 100_000, "not JSON")
    refused(raw | {"vision_config": vision | {"num_hidden_layers": 10_001}}, "num_hidden_layers = 10001 is more")
    refused(raw | {"vision_config": vision | {"patch_size": 0}}, "does not describe a CLIPModel")
    refused(raw | {"vision_config": 3}, "does not describe a CLIPModel")
    refused(raw | {"architectures": {"x": 1}}, "architecture")
    header = {"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    content = json.dumps(header).encode()
    (tmp_path / "y.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + b"\0" * 8)
    with pytest.raises(UserError, match="of type I64"):
        files.map_tensors(files.read_header(tmp_path / "y.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    for name in (3, "../model.safetensors", "a/b.safetensors", "\0"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(UserError, match=r"not an index|no file beside it"):
            files.read_headers(tmp_path)
