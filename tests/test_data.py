"""Records, mixtures, bad records, limits, worker processes, and shards that `prepare` writes."""

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from uae_jax import config as configs
from uae_jax.data import __main__ as command
from uae_jax.data import images, prepare, records, sources
from uae_jax.data.order import Order, Tally
from uae_jax.errors import UserError
from uae_jax.stages import rl

SIZE = 8


def shade(i):
    return np.full((10, 15, 3), 5 * i, np.uint8)


def folder(root, n, broken=()):
    """n pictures, number i of shade 5 i; broken ones are cut in the middle."""
    root.mkdir(exist_ok=True)
    for i in range(n):
        path = root / f"{i:03}.png"
        Image.fromarray(shade(i)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:45])
    return root


def pictures(root, **options):
    return sources.Pictures(records.read_folder(root), SIZE, **options)


def shades(batch):
    return (batch["image"][:, 0, 0, 0] // 5).tolist()


# ---- where a record lies ---------------------------------------------------------------------------------------------


def test_metadata_gives_captions_and_cannot_leave_its_folder(tmp_path):
    root = folder(tmp_path / "f", 3)
    lines = [{"file_name": "002.png", "text": "two"}, {"file_name": "000.png", "text": "a\u2028b"}]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n")
    assert [(p.name, p.caption) for p in records.read_folder(root)] == [("000.png", "a\u2028b"), ("002.png", "two")]
    for name in ("../x.png", "/etc/x.png", "a/../../x.png", 3, None):
        (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": ""}))
        with pytest.raises(UserError, match=r"metadata.jsonl, line 1: .*(outside|expected)"):
            records.read_folder(root)


def test_fields_of_jsonl_are_mapped(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"file": "a.png", "long": "text", "caption": "short"}))
    assert records.read_pairs(tmp_path / "x.jsonl", "file", "long")[0] == (tmp_path / "a.png", "text", "a.png")


# ---- what a picture may be -------------------------------------------------------------------------------------------


def test_bytes_and_files_are_read_alike_and_limited(tmp_path):
    path = folder(tmp_path, 3) / "002.png"
    content = path.read_bytes()
    np.testing.assert_array_equal(np.asarray(images.load_image(content)), shade(2))
    for what in (path, content):
        with pytest.raises(images.BadImage, match=f"{len(content)} bytes exceed"):
            images.load_image(what, images.Limits(max_bytes=len(content) - 1), "n")
        with pytest.raises(images.BadImage, match="15 x 10 exceeds the limit of 149 pixels"):
            images.load_image(what, images.Limits(max_pixels=149), "n")
        images.load_image(what, images.Limits(len(content), 150), "n")


def test_no_pipe_is_opened_and_no_other_program_is_started(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(images.BadImage, match="not a file"):
        images.load_image(tmp_path / "pipe.png")
    Image.fromarray(shade(1)).save(tmp_path / "script.eps")
    with pytest.raises(images.BadImage, match="not an image"):
        images.load_image((tmp_path / "script.eps").read_bytes())


def test_fits():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10], pixels[:, 30:] = (255, 0, 0), (0, 0, 255)
    picture = Image.fromarray(pixels)
    assert (images.fit(picture, 20) == pixels[:, 10:30]).all()
    padded = images.fit(picture, 20, "pad")
    assert (padded[:5] == 255).all() and (padded[15:] == 255).all() and (padded[7:13, 1] == (255, 0, 0)).all()
    stretched = images.fit(picture, 20, "stretch")
    assert (stretched[:, 1] == (255, 0, 0)).all() and (stretched[:, -2] == (0, 0, 255)).all()
    crops = [images.fit(picture, 20, "random_crop", np.random.default_rng(i)) for i in range(40)]
    starts = {next(x for x in range(21) if (crop == pixels[:, x : x + 20]).all()) for crop in crops}
    assert min(starts) < 4 and max(starts) > 16 and len(starts) > 8


def test_random_crops_are_a_function_of_seed_and_position(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (10, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")

    def read(seed):
        found = sources.batches(pictures(tmp_path, how="random_crop", seed=seed), [0], 2, 0)
        return np.stack([found[step]["image"] for step in (2, 0, 1)])

    np.testing.assert_array_equal(read(1), read(1))
    assert len(np.unique(read(1).reshape(6, -1), axis=0)) > 3 and (read(1) != read(2)).any()


# ---- order -----------------------------------------------------------------------------------------------------------


def test_a_mixture_holds_its_parts_by_weight_and_each_in_epochs():
    order = Order([range(6), range(6, 16)], [3.0, 1.0], seed=1)
    found = [next(iter(order.candidates(p))) for p in range(240)]
    first = [i for i in found if i < 6]
    second = [i for i in found if i >= 6]
    assert len(first) == 180 and all(sorted(first[e : e + 6]) == list(range(6)) for e in range(0, 180, 6))
    assert all(sorted(second[e : e + 10]) == list(range(6, 16)) for e in range(0, 60, 10))
    for start in range(0, 220, 20):
        assert abs(sum(i < 6 for i in found[start : start + 20]) - 15) <= 1
    assert list(order.candidates(0)) in ([[*range(i, 6), *range(i)] for i in range(6)])


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_any_number_of_processes_reads_the_same_batches(tmp_path, processes):
    source = pictures(folder(tmp_path, 9, broken=[4]))
    order = Order([range(5), range(5, 9)], [1.0, 2.0], seed=3)
    whole = sources.Batches(source, order, 6)
    share = 6 // processes
    shares = [range(k * share, (k + 1) * share) for k in range(processes)]
    for step in (7, 0, 3):
        joined = np.concatenate([whole.read(step, rows)[0]["index"] for rows in shares])
        np.testing.assert_array_equal(joined, whole[step]["index"])
        assert shades(whole[step]) == joined.tolist() and 4 not in joined


class Numbers:
    """Stands in for pictures: number i is filled with i, and the `broken` ones cannot be read."""

    def __init__(self, count, broken):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise images.BadImage(str(index), "broken")
        return {"image": np.full((1, 1, 3), index, np.uint8)}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_run_goes_on_at_the_same_example_with_any_number_of_processes(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    ends = np.cumsum([0, *sizes]).tolist()
    groups = [range(a, b) for a, b in itertools.pairwise(ends)]
    broken = {i for group in groups for i in group[1:] if data.draw(st.booleans())}
    weights = [data.draw(st.floats(0.01, 100.0)) for _ in groups]
    seed, batch = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 6))
    first, steps = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 4))
    source = Numbers(ends[-1], broken)

    def examples(start, count, size, parts):
        """Examples `start`... as so many processes read them, in batches of `size`."""
        order = Order(groups, weights, seed)  # each process makes its own
        bounds = [size * k // parts for k in range(parts + 1)]
        shares = [range(a, b) for a, b in itertools.pairwise(bounds) if a < b]
        reader = sources.Batches(source, order, size)
        steps = range(start // size, (start + count) // size)
        return [i for step in steps for share in shares for i in reader.read(step, share)[0]["index"].tolist()]

    whole = examples(first * batch, steps * batch, batch, 1)
    stopped = data.draw(st.integers(0, steps))
    before = examples(first * batch, stopped * batch, batch, data.draw(st.integers(1, batch)))
    after = examples((first + stopped) * batch, (steps - stopped) * batch, batch, data.draw(st.integers(1, batch)))
    assert before + after == whole == examples(first * batch, steps * batch, 1, 1)
    # ... and what stands in for a broken one is the next of its own part that is whole.
    order = Order(groups, weights, seed)
    for position, found in enumerate(whole, first * batch):
        wanted = next(iter(order.candidates(position)))
        group = next(list(group) for group in groups if wanted in group)
        turned = group[group.index(wanted) :] + group[: group.index(wanted)]
        assert found == next(i for i in turned if i not in broken)


# ---- bad records -----------------------------------------------------------------------------------------------------


def test_bad_records_are_replaced_counted_and_named_once(tmp_path, caplog):
    source = pictures(folder(tmp_path, 10, broken=[2, 3, 9]))
    order = Order([range(10)], [1.0], seed=0)
    plain = [next(iter(order.candidates(p))) for p in range(30)]
    tally = Tally(10, 0.3)
    found = list(sources.prefetch(sources.Batches(source, order, 5, tally), 0, 6))
    read = [i for batch in found for i in batch["index"].tolist()]
    assert read == [{2: 4, 3: 4, 9: 0}.get(i, i) for i in plain]
    assert sorted(tally.bad) == ["002.png", "003.png", "009.png"]
    for name in tally.bad:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UserError, match=r"3 of 10 records are bad.*max_bad_fraction = 0.2.*0\d\d.png") as caught:
        list(sources.prefetch(sources.Batches(source, order, 5, Tally(10, 0.2)), 0, 6))
    assert "\n" not in str(caught.value)


def test_worker_processes_read_the_same(tmp_path, caplog):
    source = pictures(folder(tmp_path / "f", 10, broken=[2]), how="random_crop")
    tally = Tally(10, 0.5)
    batches = sources.Batches(source, Order([range(10)], [1.0], seed=0), 5, tally)
    placed = []
    found = list(sources.prefetch(batches, 3, 8, workers=2, place=lambda x: placed.append(x) or x))
    assert len(placed) == 5 and list(tally.bad) == ["002.png"]
    for step, batch in enumerate(found, 3):
        for name, value in batches[step].items():
            np.testing.assert_array_equal(batch[name], value)


def test_an_error_in_a_worker_process_is_the_same_error(tmp_path):
    source = pictures(folder(tmp_path / "f", 3, broken=[0, 1, 2]))
    batches = sources.Batches(source, Order([range(3)], [1.0], seed=0), 2, Tally(3, 1.0))
    for workers in (0, 1):
        with pytest.raises(UserError, match="none of the 3 pictures can be read"):
            list(sources.prefetch(batches, 0, 2, workers))


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path, caplog):
    name = "\x1b[2J\u202e\n.png"
    (tmp_path / name).write_bytes(b"no picture")
    Image.fromarray(shade(1)).save(tmp_path / "a.png")
    tally = Tally(2, 0.5)
    list(sources.prefetch(sources.Batches(pictures(tmp_path), Order([range(2)], [1.0], 0), 2, tally), 0, 2))
    assert list(tally.bad) == [r"\x1b[2J\u202e\n.png"] and all(r.getMessage().isprintable() for r in caplog.records)
    with pytest.raises(UserError, match="records are bad") as caught:
        Tally(2, 0.0).add([(name, reason) for name, reason in tally.bad.items()])
    assert str(caught.value).isprintable()


def config(root, **changes):
    c = configs.default().unlock()
    c.data.source, c.data.path, c.data.image_size, c.data.held_out, c.data.batch_size = "folder", str(root), SIZE, 3, 4
    c.data.update(changes)
    configs.validate(c.lock())
    return c


def test_rl_reads_every_source_and_holds_out_the_same_pictures(tmp_path):
    root = folder(tmp_path / "f", 13, broken=[3])
    lines = [json.dumps({"image": f"f/{i:03}.png", "caption": ""}) for i in range(13)]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    c = config(root, max_bad_fraction=0.1)
    batches, held, scenes = rl.load_data(c)
    read = {i for step in range(12) for i in shades(batches[step])}
    kept = {int(i) for i in held[:, 0, 0, 0] // 5}
    assert scenes is None and held.shape == (len(kept), SIZE, SIZE, 3)
    assert not read & kept and read | kept == set(range(13)) - {3}
    batches, again, _ = rl.load_data(config(tmp_path / "f.jsonl", source="jsonl", max_bad_fraction=0.1))
    np.testing.assert_array_equal(again, held)
    parts = {"a": {"source": "folder", "path": str(root), "weight": 1.0}}
    parts["b"] = {"source": "jsonl", "path": str(tmp_path / "f.jsonl"), "weight": 2.0}
    mixed, held, _ = rl.load_data(config("", source="mixture", mixture=ConfigDict(parts), max_bad_fraction=0.1))
    index = np.concatenate([mixed[step]["index"] for step in range(30)])
    assert (index >= 13).sum() == 80 and len(held) == 3


# ---- shards ----------------------------------------------------------------------------------------------------------


def run(*arguments):
    command.main(["data", *arguments])


def contents(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_prepared_shards_hold_the_pictures_and_name_what_is_broken(tmp_path, capsys):
    root, out = folder(tmp_path / "f", 10, broken=[3]), tmp_path / "out"
    run("prepare", f"--path={root}", f"--out={out}", "--rows=4")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["records"] == 9 and [s["records"] for s in manifest["shards"]] == [3, 4, 2]
    assert [bad["name"] for bad in manifest["skipped"]] == ["003.png"] and manifest["skipped"][0]["reason"]
    found = records.ArrayRecords(out)
    good = [i for i in range(10) if i != 3]
    assert [found[i].name for i in range(len(found))] == [f"{i:03}.png" for i in good]
    source = sources.Pictures(found, SIZE)
    assert [source[i]["image"][0, 0, 0] // 5 for i in range(9)] == good
    run("verify", str(out))
    assert "9 records, all" in capsys.readouterr().out
    batches, held, _ = rl.load_data(config(out, source="array_record"))
    again = pickle.loads(pickle.dumps(batches))  # as it goes to a worker process
    assert shades(again[1]) == shades(batches[1]) and len(held) == 2


def test_prepare_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    root = folder(tmp_path / "f", 10, broken=[3])
    run("prepare", f"--path={root}", f"--out={tmp_path / 'whole'}", "--rows=4")
    out, write, written = tmp_path / "out", prepare._write, []

    def dies(source, indices, path, limits):
        written.append(indices.start)
        if len(written) == 2:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(source, indices, path, limits)

    monkeypatch.setattr(prepare, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        run("prepare", f"--path={root}", f"--out={out}", "--rows=4")
    with pytest.raises(UserError, match="goes on where it was stopped"):
        records.ArrayRecords(out)
    run("prepare", f"--path={root}", f"--out={out}", "--rows=4")
    assert written == [0, 4, 4, 8] and contents(out) == contents(tmp_path / "whole")
    for changed in ("--rows=5", "--max_pixels=149"):
        with pytest.raises(UserError, match="begun from other pictures"):
            run("prepare", f"--path={root}", f"--out={out}", "--rows=4", changed)


def test_prepare_survives_being_killed(tmp_path):
    root = folder(tmp_path / "f", 40, broken=[3])
    run("prepare", f"--path={root}", f"--out={tmp_path / 'whole'}", "--rows=2")
    out, rng = tmp_path / "out", np.random.default_rng(0)
    command = [sys.executable, "-m", "uae_jax.data", "prepare", f"--path={root}", f"--out={out}", "--rows=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done: dict[str, int] = {}
    kills = 0
    for _ in range(20):
        if kills == 2:
            break
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            for _ in range(3):
                assert process.stdout.readline()
            time.sleep(0.002 * rng.random())
            process.send_signal(signal.SIGKILL)
        if (out / "manifest.json").exists():  # on a busy machine it may end before the kill comes: once more
            shutil.rmtree(out)
            done, kills = {}, 0
            continue
        assert process.returncode == -signal.SIGKILL
        kills += 1
        notes = {path.name: path.stat().st_mtime_ns for path in out.glob("data-*.json")}
        assert len(notes) >= 3 * kills and notes.items() >= done.items()  # what was done is not done again
        done = notes
    assert kills == 2
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
    run("verify", str(out))


def test_damaged_notes_are_made_again_and_manifests_refused(tmp_path):
    out = tmp_path / "out"
    run("prepare", f"--path={folder(tmp_path / 'f', 6)}", f"--out={out}", "--rows=3")
    whole = contents(out)
    for content in (b"", b"[]", b"{}", b"\xff", b'{"records": 3}'):
        (out / "data-00001-of-00002.json").write_bytes(content)
        run("prepare", f"--path={tmp_path / 'f'}", f"--out={out}", "--rows=3")
        assert contents(out) == whole
    manifest = json.loads(whole["manifest.json"])
    records.ArrayRecords(out)
    wrong = [{"file": "../out/data-00000-of-00002.array_record"}, {"file": "/etc/passwd"}, {"records": 10**6}]
    for changes in (*wrong, {"records": None}, {"bytes": 3}, {"sha256": 3}):
        shards = [manifest["shards"][0] | changes, manifest["shards"][1]]
        (out / "manifest.json").write_text(json.dumps(manifest | {"shards": shards}))
        with pytest.raises(UserError, match="prepare the data again"):
            records.ArrayRecords(out)


def test_damaged_shards(tmp_path):
    out = tmp_path / "out"
    run("prepare", f"--path={folder(tmp_path / 'f', 6)}", f"--out={out}", "--rows=3")
    path = out / "data-00001-of-00002.array_record"
    whole = path.read_bytes()
    middle = whole.index(b'"name"')
    path.write_bytes(whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 20]) + whole[middle + 20 :])
    with pytest.raises(UserError, match=r"data-00001-of-00002.array_record has been changed: .*checksum; remove it"):
        run("verify", str(out))
    found, bad = sources.Pictures(records.ArrayRecords(out), SIZE), 0
    for i in range(6):
        try:
            assert found[i]["image"][0, 0, 0] == 5 * i
        except images.BadImage as error:
            bad += 1
            assert "record" in str(error) and i >= 3
    assert bad == 1
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"00001-of-00002.*missing or not"):
        records.ArrayRecords(out)
    run("prepare", f"--path={tmp_path / 'f'}", f"--out={out}", "--rows=3")  # makes the damaged one again
    assert path.read_bytes() == whole


def test_what_prepare_refuses(tmp_path):
    root = folder(tmp_path / "f", 2, broken=[0, 1])
    for arguments, said in (
        (["prepare"], "usage"),
        (["prepare", f"--path={root}", f"--out={root / 'out'}"], "lies in the folder"),
        (["prepare", f"--path={root}", f"--out={tmp_path}"], "is not empty"),
        (["prepare", f"--path={root}", f"--out={tmp_path / 'o'}"], "none of the 2 pictures"),
        (["prepare", f"--path={root}", f"--out={tmp_path / 'p'}", "--rows=0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            run(*arguments)
