"""Unified-Bench of a model that captions and redraws: what is drawn, its controls, and the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.test_unified_bench import CLIP_CONFIG, save
from uae_jax import checkpoint, evaluate
from uae_jax.bench import redrawing, unified_bench
from uae_jax.bench.redrawing import Captions
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import initial
from uae_jax.models.clip.model import CLIP

END = 0
COLOURS = {"black": 1, "red": 2, "green": 3, "blue": 4}
SIZE = 16


def paint(token: int) -> np.ndarray:
    """A texture of its own for each word."""
    return np.random.default_rng(token).random((SIZE, SIZE, 3))


def model(noise: float = 0.0) -> redrawing.Redrawer:
    """Draws the sum of its words, and captions nothing."""

    def draw(captions: Captions) -> np.ndarray:
        rows = [[t for t in row[keep] if t != END] for row, keep in zip(*captions, strict=True)]
        return np.stack([np.mean([paint(t) for t in row] or [np.full((SIZE, SIZE, 3), 0.5)], axis=0) for row in rows])

    def write() -> Captions:
        return redrawing.encoded(["red", "green green", "blue", "black"], found)

    found = redrawing.Redrawer(
        SIZE, 4, END, lambda text: [COLOURS[word] for word in text.split()],
        lambda captions: [str(n) for n in captions.lengths(END)],
        lambda pictures: redrawing.Canvas(write, draw),
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A tiny CLIP."""
    where = tmp_path_factory.mktemp("towers") / "clip"
    params = initial(CLIP(CLIP_CONFIG), jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 5), int))
    folder.save_model(where, CLIP_CONFIG, params)
    return {"clip": where}


@pytest.fixture
def sources(tmp_path):
    """Four textures, a caption each."""
    for name in COLOURS:
        save(tmp_path / f"sources/deep/{name}.png", np.round(paint(COLOURS[name]) * 255).astype(np.uint8))
    return tmp_path / "sources"


def captions_file(path, captions):
    path.write_text("\n".join(json.dumps({"file_name": k, "text": v}) for k, v in captions.items()))
    return path


def test_cut_and_shuffle():
    captions = redrawing.encoded(["red green blue black", "", "red", "green blue"], model())
    assert captions.tokens.tolist() == [[2, 3, 4, 1], [0, 0, 0, 0], [2, 0, 0, 0], [3, 4, 0, 0]]
    assert captions.mask.sum(1).tolist() == [4, 1, 2, 3] and captions.lengths(END).tolist() == [4, 0, 1, 2]
    short = redrawing.cut(captions, np.array([2, 2, 2, 1]), END)
    assert short.tokens.tolist() == [[2, 3, 0, 0], [0] * 4, [2, 0, 0, 0], [3, 0, 0, 0]]
    assert short.mask.sum(1).tolist() == [3, 1, 2, 2]
    turned = redrawing.shuffled(captions, np.array([0, 2, 3]))
    assert turned.tokens[:, 0].tolist() == [2, 0, 3, 2]  # the empty one stays
    assert turned.tokens[0].tolist() == [2, 0, 0, 0]


def test_same_length_of_one_system_and_of_two():
    first, second = (redrawing.encoded(t, model()) for t in (["red", "green green", ""], ["red red", "green", "blue"]))
    present = {"redrawn": np.ones(3, bool), "against": np.array([True, True, True])}
    alone = redrawing.variants({"redrawn": first}, present, END)
    assert alone["redrawn/same_length"].lengths(END).tolist() == [1, 1, 0]
    both = redrawing.variants({"redrawn": first, "against": second}, present, END)
    assert set(both) == {
        f"{x}{y}" for x in present for y in ("", "/shuffled_captions", "/empty_caption", "/same_length")
    }
    for name in present:
        assert both[f"{name}/same_length"].lengths(END).tolist() == [1, 1, 0]
        assert not both[f"{name}/empty_caption"].lengths(END).any()


def test_captions_of_any_captioner_are_compared_under_one_decoder(sources, towers, tmp_path):
    right = captions_file(tmp_path / "right.jsonl", {f"{name}.png": name for name in COLOURS} | {"none.png": "red"})
    wrong = captions_file(tmp_path / "wrong.jsonl", {"black.jpg": "red", "red.png": "black blue", "green.png": "green"})
    out = tmp_path / "out"
    result = redrawing.run(sources, model(), towers, out, right, wrong, batch_size=4)
    # The right word draws the source itself, to the last level.
    assert result["overall"] == pytest.approx(100, abs=0.1) and not result["missing"]
    for control in ("shuffled_captions", "empty_caption"):
        found = result["controls"][control]
        assert found["overall"] < 99 and set(found["by_tower"]) == set(towers)
        assert found["by_tower"]["clip"]["n"] == 4 and len(found["overall_interval"]) == 2
    against = result["against"]
    assert [(x["source"], x["reason"]) for x in against["missing"]] == [("deep/blue.png", "no caption")]
    assert against["per_image"]["deep/green.png"]["clip"] == pytest.approx(1, abs=1e-3)
    assert against["difference"]["overall"]["mean"] > 20  # a quarter of it for the missing one
    assert against["difference_at_same_length"]["overall"]["mean"] > 20
    assert result["captions"]["redrawn"] == {
        "tokens": 1, "tokens_at_same_length": 0.75, "cut": 0, "of_no_source": ["none.png"],
    }  # fmt: skip
    assert result["captions"]["against"]["tokens"] == pytest.approx(4 / 3)
    text = (out / "unified_bench.md").read_text()
    assert "| shuffled_captions |" in text and "at the same caption length" in text
    drawn = np.asarray(Image.open(out / "redrawn/deep/red.png"))
    assert np.array_equal(drawn, np.asarray(Image.open(sources / "deep/red.png")))
    assert not (out / "captions.jsonl").exists() and not (out / "against/deep/blue.png").exists()
    # What was drawn is scored alike as any system's pictures.
    again = unified_bench.run(sources, out / "redrawn", towers, tmp_path / "again")
    assert again["overall"] == pytest.approx(result["overall"], abs=1e-4)


def test_own_captions_are_written_down(sources, towers, tmp_path):
    result = redrawing.run(sources, model(), towers, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [f"deep/{name}.png" for name in ("black", "blue", "green", "red")]
    assert result["controls"]["same_length"]["by_tower"].keys() == towers.keys()


def test_bad_captions(sources, towers, tmp_path):
    strange = captions_file(tmp_path / "strange.jsonl", {"a.png": "red"})
    with pytest.raises(UserError, match="no caption of a picture"):
        redrawing.run(sources, model(), towers, tmp_path / "out", strange)
    save(sources / "red.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"stem.*red\.png"):
        redrawing.run(sources, model(), towers, tmp_path / "out", strange)


def test_command_line(weights, towers, tmp_path, capsys, monkeypatch):
    """From a folder of weights, and from a run's workdir: the same weights draw the same."""
    for i, picture in enumerate(tiny.scenes(3)):
        save(tmp_path / f"sources/{i}.png", picture)
    flags = [
        "evaluate", "unified_bench", f"--sources={tmp_path}/sources", f"--towers=clip={towers['clip']}",
        "--batch_size=3",
    ]  # fmt: skip
    fields = ["--config=configs/tiny.py", "--config.rl.max_tokens=8", f"--weights={weights}"]
    arguments = [*flags, f"--out={tmp_path}/folder", *fields]
    monkeypatch.setattr("sys.argv", arguments)  # where ml_collections looks for overrides
    evaluate.main(arguments)
    printed = capsys.readouterr().out
    assert "| **overall** |" in printed and "| same_length |" in printed
    workdir = tmp_path / "run"
    checkpoint.write_config(workdir, tiny.config(weights).to_dict())
    captions = f"--captions={tmp_path}/folder/captions.jsonl"
    evaluate.main([*flags, f"--out={tmp_path}/run_out", f"--workdir={workdir}", captions])
    first, second = (json.loads((tmp_path / x / "unified_bench.json").read_text()) for x in ("folder", "run_out"))
    assert first["by_tower"]["clip"]["n"] == 3 and first["per_image"] == second["per_image"]
    assert first["controls"]["shuffled_captions"]["overall"] != first["overall"]
    for more, message in (
        ([], "needs pictures"),
        (["--reconstructions=x", captions], "leave out"),
        (["--config=none.py"], "no file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([*flags, f"--out={tmp_path}/no", *more])
