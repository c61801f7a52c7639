"""The writer: a resumed run leaves the file of an uninterrupted one; a full disk is one line, not a hang."""

import errno
import io
import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from uae_jax.errors import UserError
from uae_jax.metrics import Writer, sparkline

COLUMNS = {"reward/mean": ("reward", ".3f"), "kl": ("KL", ".4f"), "throughput/images_per_s": ("images/s", ".1f")}


def paper(width=100, **options):
    return Console(file=io.StringIO(), width=width, **options)


def metrics(step):
    return {"reward/mean": step / 7, "kl": step * 1e-3, "caption/length": 3.0}


def record(workdir, steps, resume=None, total=40):
    with Writer(workdir, total, COLUMNS, resume, paper()) as writer:
        for step in steps:
            writer.write(step, metrics(step))


def events(workdir):
    """All TensorBoard events of a workdir, oldest file first."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def visible(workdir):
    """{(tag, step): value} as TensorBoard shows them: a start at step k hides what came before from k on."""
    values = {}
    for event in events(workdir):
        if event.HasField("session_log"):
            values = {at: value for at, value in values.items() if at[1] < event.step}
        for value in event.summary.value:
            assert (value.tag, event.step) not in values
            values[value.tag, event.step] = value.simple_value
    return values


@pytest.mark.parametrize("torn", [b"", b'{"step": 10, "rew', b'{"step": 3'])
def test_a_resumed_run_leaves_the_same_record_as_an_uninterrupted_one(tmp_path, torn):
    record(tmp_path / "whole", range(1, 13))
    record(tmp_path / "broken", range(1, 10))
    with open(tmp_path / "broken" / "metrics.jsonl", "ab") as file:
        file.write(torn)
    record(tmp_path / "broken", range(7, 13), resume=6)
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken"))
    assert broken == whole and whole.count(b"\n") == 12
    assert visible(tmp_path / "broken") == visible(tmp_path / "whole")


def test_a_run_that_starts_again_from_nothing_does_not_keep_the_lines_of_the_first(tmp_path):
    for resume in (None, 0):
        record(tmp_path, range(0, 4), resume)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert len(visible(tmp_path)) == 12


def test_numbers_of_any_kind_are_plain_floats_and_what_is_not_finite_is_null(tmp_path):
    values = {"a": 1, "b": np.float32(0.5), "c": jnp.bfloat16(2), "d": jnp.array(0.25), "e": np.nan, "f": jnp.inf}
    with Writer(tmp_path, 1, {}, console=paper()) as writer:
        writer.write(np.int32(1), values)
        # on disk at once: who follows the file sees every step
        line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "a": 1.0, "b": 0.5, "c": 2.0, "d": 0.25, "e": null, "f": null}\n'
    assert visible(tmp_path)["b", 1] == 0.5 and np.isnan(visible(tmp_path)["e", 1])


def test_an_image_is_a_sample_file_and_a_tensorboard_image(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    with Writer(tmp_path, 10, {}, console=paper()) as writer:
        writer.image(3, "redraws", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples" / "redraws_000003.png")), picture)
    (image,) = [value.image for event in events(tmp_path) for value in event.summary.value]
    assert (image.height, image.width) == (6, 9)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)


def test_without_a_terminal_there_are_about_fifty_aligned_lines(tmp_path):
    console = paper(width=40)  # what a log file is taken for must not break its lines
    with Writer(tmp_path, 200, COLUMNS, console=console) as writer:
        for step in range(1, 201):
            writer.write(step, metrics(step))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 50 and lines[-1].startswith("step 200/200  reward    28.571  KL    0.2000  images/s         -")
    assert {line.index("KL") for line in lines} == {lines[0].index("KL")}
    assert "\x1b" not in console.file.getvalue()
    assert "left" in lines[20]


def test_the_live_panel_shows_progress_numbers_and_curve_below_messages(tmp_path):
    console = paper(force_terminal=True)
    with Writer(tmp_path, 200, COLUMNS, console=console) as writer:
        for step in (1, 2, 60):
            writer.write(step, metrics(step))
        writer.message("saved [b, g]")
    text = console.file.getvalue()
    last = text[text.rindex("╭") :]
    assert "saved [b, g]" in text and "saved" not in last
    for part in ("step 60/200", "left", "reward", "8.571", "KL", "0.0600", "▁▁█", "-"):
        assert part in last, part


def test_a_table_keeps_brackets_and_every_cell(tmp_path):
    console = paper()
    with Writer(tmp_path, 1, {}, console=console) as writer:
        writer.table("held out [500]", ["measure", "before", "after"], [["reward [b]", "0.31", "0.62"]])
    text = console.file.getvalue()
    assert all(part in text for part in ("held out [500]", "measure", "reward [b]", "0.31", "0.62"))


def test_the_sparkline_runs_from_the_lowest_to_the_highest():
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁" and sparkline([]) == "" and sparkline([float("nan")]) == ""
    assert len(sparkline(range(1000), 20)) == 20 and sparkline(range(1000), 20)[-1] == "█"


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    console = paper()
    with Writer(tmp_path / "w", 1, COLUMNS, console=console) as writer:
        writer.write(1, metrics(1))
        writer.image(1, "x", np.zeros((2, 2, 3), np.uint8))
        writer.message("hello")
        writer.table("t", ["a"], [["b"]])
    assert not (tmp_path / "w").exists() and console.file.getvalue() == ""


def test_a_workdir_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/w: Not a directory"):
        Writer(tmp_path / "file" / "w", 1, {}, console=paper())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's always-full device")
def test_a_full_disk_stops_the_run_with_the_path(tmp_path):
    with (
        pytest.raises(UserError, match=r"metrics\.jsonl: No space left on device"),
        Writer(tmp_path, 1, COLUMNS, console=paper()) as writer,
    ):
        writer._lines.close()
        writer._lines = open("/dev/full", "w")  # noqa: SIM115
        writer.write(1, metrics(1))


def test_a_full_tensorboard_file_is_an_error_and_not_a_hang(tmp_path, monkeypatch):
    with Writer(tmp_path, 1, COLUMNS, console=paper()) as writer, monkeypatch.context() as patched:

        def full(_event):
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(writer._board, "write_event", full)
        for _ in range(20):
            with pytest.raises(UserError, match="tensorboard: No space left on device"):
                writer.write(1, metrics(1))
