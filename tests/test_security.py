"""What hostile data, weights and names cannot do: run code, write where they should not, or speak to the terminal."""

import csv
import io
import json
import logging
import pickle
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests import tiny
from uae_jax import evaluate, from_text, pictures, reconstruct, report, runtime, sharding, system
from uae_jax.bench import caption_duel, scores, unified_bench
from uae_jax.convert import files
from uae_jax.data import images, records, sources
from uae_jax.errors import UserError
from uae_jax.metrics import Writer
from uae_jax.printable import markdown, printable

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("uae_jax", "configs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*")
)
CODE = {path: path.read_text() for path in SOURCES if path.suffix in (".py", ".sh", ".ipynb")}

HOSTILE = "a\x1b[2J\x07\nERROR: b\r\x9b31m\u202ec\u2066\u200b\udcff|<script>[x](y)`"
# None of these reaches a terminal or a report.
ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# ---- text that is shown


def test_nothing_but_shows():
    shown = printable(HOSTILE)
    assert shown == r"a\x1b[2J\x07\nERROR: b\r\x9b31m\u202ec\u2066\u200b\udcff|<script>[x](y)`"
    assert not ACTIVE.search(shown) and "\n" not in shown
    for text in ("", "Plain, text!", "Ünï-cödé 漢字 عربى", "🙂"):
        assert printable(text) == text
    assert markdown("<b>|[a](b)`&") == "&#60;b&#62;&#124;&#91;a&#93;(b)&#96;&#38;"


def test_the_terminal_of_a_run(tmp_path):
    out = io.StringIO()
    with Writer(tmp_path, 1, {}, console=Console(file=out, force_terminal=False, width=200)) as writer:
        writer.message(HOSTILE)
        writer.table("scores", ["name"], [[HOSTILE]])
    said = out.getvalue()
    assert not ACTIVE.search(said) and said.count(r"\x1b[2J") == 2 and "\nERROR" not in said


def test_errors_and_warnings(capsys, monkeypatch):
    def refuse(_arguments):
        raise UserError(f"cannot read {HOSTILE}")

    monkeypatch.setattr(runtime.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit):
        runtime.run(refuse, [])
    said = capsys.readouterr().err
    assert said.startswith("error: cannot read a\\x1b") and said.count("\n") == 1 and not ACTIVE.search(said)

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "unused")
    runtime.prepare()
    logging.warning("skipped %s", HOSTILE)
    said = capsys.readouterr().err
    assert said.startswith("WARNING: skipped a\\x1b") and said.count("\n") == 1 and not ACTIVE.search(said)


def test_reports_in_markdown(tmp_path):
    interval = {"mean": 1.0, "low": 0.0, "high": 2.0, "n": 3}
    result = {
        "by_tower": {HOSTILE: interval},
        "overall": 1.0,
        "overall_interval": (0.0, 2.0),
        "controls": {HOSTILE: {"overall": 1.0, "overall_interval": (0.0, 1.0), "by_tower": {HOSTILE: interval}}},
        "against": {"difference": {HOSTILE: None}},
        **{name: [] for name in unified_bench.LISTED},
    }
    duel = {"by_judge": {HOSTILE: {"win_rate": dict.fromkeys("abc"), **dict.fromkeys(caption_duel.OUTCOMES, 0)}}}
    run = report.Run(tmp_path, [], *[{HOSTILE: scores.Score(np.zeros(3), np.ones(3))} for _ in range(2)])
    tables = [unified_bench.markdown(result), caption_duel.markdown(duel | {"average": None}), report.table([run])]
    for text in tables:
        assert r"a\x1b&#91;2J" in text and not ACTIVE.search(text)
        assert "<script>" not in text and "[x]" not in text
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(line.count("|") in {row.count("|") for row in rows if row.startswith("|---")} for line in rows)


@pytest.mark.parametrize("start", "=+-@")
def test_reports_in_spreadsheets(start):
    """A name of a file is no formula; figures stay figures."""
    name = f"{start}cmd|' /C calc'!A0\x1b.png"
    missing = [{"source": name, "reason": name}]
    result = {"missing": missing, "by_tower": {name: None}, "per_image": {name: {name: -0.5}}}
    rows = list(csv.reader(unified_bench.table(result).splitlines()))
    shown = f"'{start}cmd|' /C calc'!A0\\x1b.png"
    assert rows == [["source", shown, "failure"], [shown, "-0.500000", shown]]


def test_captions_in_pictures():
    class Font:
        getlength = staticmethod(len)

    assert pictures.wrap("a\u202eb c\x1b", Font, 100) == [r"a\u202eb c\x1b"]


def test_a_picture_with_a_hostile_name(weights, tmp_path, capsys, monkeypatch):
    name = "a\x1b[2J\n\u202eb.png"
    Image.fromarray(tiny.scenes(1)[0]).save(tmp_path / name)
    (tmp_path / "bad\x1b.png").write_text("no picture")

    class Evaluator:
        def __init__(self, *args):
            pass

        def write(self, params):
            return None, None, None

        def draw(self, params, tokens, mask):
            return {"towers": {"clip": np.ones(1)}, "image": np.zeros((1, 48, 48, 3))}

    monkeypatch.setattr("uae_jax.bench.held_out.Evaluator", Evaluator)
    monkeypatch.setattr("uae_jax.data.text.decode_captions", lambda *_: [HOSTILE])
    monkeypatch.setattr(reconstruct, "load_run", lambda *_: (type("Built", (), {"tokenizer": None}), None, 0))
    config = tiny.config(weights)
    config.unlock()
    reconstruct.reconstruct(None, [str(tmp_path / name), str(tmp_path / "bad\x1b.png")], tmp_path / "out.png", config)
    said = capsys.readouterr()
    assert r"a\x1b[2J\n\u202eb.png" in said.out and r"bad\x1b.png" in said.err
    assert not ACTIVE.search(said.out + said.err)


# ---- files that are read


class Exploit:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_arrays_are_never_read_as_pickles(tmp_path):
    mark = tmp_path / "mark"
    hostile = np.array([Exploit(mark)], dtype=object)
    np.savez(tmp_path / "eval_before.npz", **{"reward/mean": hostile})
    with pytest.raises(UserError):
        scores.load(tmp_path / "eval_before.npz")
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples" / "held_out_000001.npz", source=hostile)
    with pytest.raises(ValueError, match="allow_pickle"):
        report.redraws(report.Run(tmp_path, [], {}, {}))
    assert not mark.exists()
    with np.load(tmp_path / "eval_before.npz", allow_pickle=True) as file:  # the exploit is one
        file["reward/mean"]
    assert mark.exists()


def test_arrays_are_never_written_as_pickles(tmp_path):
    with Writer(tmp_path, 1, {}) as writer:
        writer.arrays(1, "fine", text=["a", "b"], image=np.zeros(2))
        with pytest.raises(ValueError, match="caption would be written as pickles"):
            writer.arrays(1, "bad", caption=[{"a": 1}])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["fine_000001.npz"]


def test_weights_are_never_read_as_pickles(weights, tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_bytes((weights / "clip" / "config.json").read_bytes())
    (tmp_path / "clip" / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(mark)))
    (tmp_path / "clip" / "model.safetensors").write_bytes(pickle.dumps(Exploit(mark)))
    for _ in range(2):
        with pytest.raises(UserError):
            files.read_headers(tmp_path / "clip")
        (tmp_path / "clip" / "model.safetensors").unlink(missing_ok=True)
    assert not mark.exists()


def test_an_index_names_files_beside_it_only(weights, tmp_path):
    (tmp_path / "model").mkdir()
    for shard in ("../outside.safetensors", "/etc/passwd", "a/b.safetensors"):
        index = {"weight_map": {"x": shard}}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="no file beside it"):
            files.read_headers(tmp_path / "model")


def test_the_command_that_turns_pickles_quotes_the_folder(tmp_path):
    folder = tmp_path / "a'; touch mark; echo '"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        files.read_headers(folder)
    command = str(caught.value).split("run ", 1)[1]
    assert shlex.split(command)[-1] == str(folder)


def test_code_in_a_model_folder_is_not_run(weights, tmp_path):
    """What transformers runs under trust_remote_code: modules that config.json and tokenizer_config.json name."""
    shutil.copytree(weights, tmp_path / "weights")
    mark = tmp_path / "mark"
    evil = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n"
    for part in ("captioner", "clip"):
        folder = tmp_path / "weights" / part
        for name in ("modeling_evil", "tokenization_evil", "configuration_evil", "__init__"):
            (folder / f"{name}.py").write_text(evil)
        named = {"AutoModel": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": named}))
        tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}, "tokenizer_class": "Evil"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = tiny.config(tmp_path / "weights")
    system.load(config, sharding.make_mesh(config))
    assert not mark.exists() and not any("evil" in name for name in sys.modules)


def test_pictures_are_written_below_their_folder_whatever_prompts_say(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "../../x", "name": "../../y", "path": "/etc"}) + "\n")
    prompts = from_text.read_prompts(tmp_path / "prompts.jsonl")
    before = set(tmp_path.rglob("*"))
    from_text.write(lambda texts, keys: np.zeros((1, 1, 8, 8, 3)), prompts, tmp_path / "out", 1, 1, 0)
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {str(path.relative_to(tmp_path / "out")) for path in new} == {
        "00000/samples/00000.png",
        "00000/metadata.jsonl",
    }


def test_images_are_data(tmp_path):
    """What ends in an image's suffix and is none: archives, scripts of formats that can do things, links."""
    (tmp_path / "data").mkdir()
    Image.fromarray(tiny.scenes(1)[0]).save(tmp_path / "data" / "good.png")
    (tmp_path / "data" / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n")
    (tmp_path / "data" / "svg.jpg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>x</script></svg>')
    (tmp_path / "data" / "pickle.gif").write_bytes(pickle.dumps(Exploit(tmp_path / "mark")))
    pairs = records.read_folder(tmp_path / "data")
    assert [pair.image.name for pair in pairs] == ["eps.png", "good.png", "pickle.gif", "svg.jpg"]
    source = sources.Pictures(pairs, 48)
    assert source[1]["image"].shape == (48, 48, 3)
    for i in (0, 2, 3):
        with pytest.raises(images.BadImage):
            source[i]
    assert not (tmp_path / "mark").exists()


# ---- the code itself


@pytest.mark.parametrize(
    "what",
    [
        r"^\s*(import|from) (pickle|dill|cloudpickle|shelve|marshal|joblib)\b",
        r"allow_pickle\s*=\s*True",
        r"np\.load\((?!.*allow_pickle=False)",
        r"trust_remote_code(?!\W*False)",
        r"(?<![.\w])(eval|exec)\(",
        r"\.extractall\(|unpack_archive\(",
        r"shell\s*=\s*True|os\.system\(",
        r"yaml\.(unsafe_)?load\(",
        r"0\.0\.0\.0|start_server\(|HTTPServer\(|\.bind\(",
    ],
)
def test_the_code_does_without(what):
    assert len(CODE) > 150
    pattern = re.compile(what, re.MULTILINE)
    found = {str(path.relative_to(ROOT)): pattern.findall(text) for path, text in CODE.items() if pattern.search(text)}
    assert not found


def test_what_evaluate_prints_of_failures_is_escaped():
    """Each line that it prints of a file's name or a reason goes through `printable`."""
    prints = re.findall(r"print\((.*(?:source|path).*)", Path(evaluate.__file__).read_text())
    assert len(prints) >= 2 and all(line.startswith("printable(") for line in prints)
