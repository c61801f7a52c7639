"""Unified-Bench: pairing, failures, scores and intervals, with tiny random towers and synthetic pictures."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from uae_jax import evaluate
from uae_jax.bench import pairing, unified_bench
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import initial
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.clip.config import TextConfig, VisionConfig
from uae_jax.models.clip.model import CLIP
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.dinov3.model import DINOv3

CLIP_CONFIG = CLIPConfig(
    VisionConfig(16, 24, 1, 2, image_size=16, patch_size=8), TextConfig(11, 16, 24, 1, 2, 5), projection_dim=8
)
DINO_CONFIG = DINOv3Config(16, 24, 1, 2, image_size=16, patch_size=8)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A tiny CLIP and a tiny DINOv3."""
    where = tmp_path_factory.mktemp("towers")
    image, key = jnp.zeros((1, 16, 16, 3)), jax.random.key(0)
    params = initial(CLIP(CLIP_CONFIG), key, image, jnp.zeros((1, 5), int))
    folder.save_model(where / "clip", CLIP_CONFIG, params)
    folder.save_model(where / "dinov3", DINO_CONFIG, initial(DINOv3(DINO_CONFIG), key, image))
    return {"clip": where / "clip", "dinov3": where / "dinov3"}


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def picture(i: int, noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(i)
    coarse = np.kron(rng.uniform(0, 255, (2, 3, 3)), np.ones((12, 10, 1)))
    return np.clip(coarse + np.random.default_rng(99 + i).normal(0, noise, coarse.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six sources; one system redraws them well but for two failures, another badly."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        save(root / f"sources/{i}.png", picture(i))
        save(root / f"bad/{i}.png", picture(i, noise=120))
    save(root / "bad/5.png", picture(5)[::2])  # of another size
    save(root / "good/0.png", picture(0))  # same name
    save(root / "good/deep/1.bmp", picture(1, noise=5))  # same stem
    save(root / "good/recon_2.png", picture(2, noise=5))
    save(root / "good/3.png", picture(3, noise=5))
    (root / "good/4.png").write_bytes(b"not a picture")  # 5 is missing
    save(root / "good/77.png", picture(77))
    save(root / "good/recon_3.png", picture(3, noise=200))
    (root / "good/notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def results(towers, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return {
        compat: (
            unified_bench.run(
                pictures / "sources", pictures / "good", towers, out / str(compat), pictures / "bad", compat, 4
            ),
            out / str(compat),
        )
        for compat in (False, True)
    }


def test_failures_count_as_zero_and_are_listed(results):
    result, _ = results[False]
    assert [(x["source"], x["reason"].split(":")[0]) for x in result["missing"]] == [
        ("4.png", "unreadable"),
        ("5.png", "no reconstruction"),
    ]
    assert [path.rsplit("/", 1)[1] for path in result["unpaired"]] == ["77.png"]
    assert [path.rsplit("/", 1)[1] for path in result["duplicates"]] == ["recon_3.png"]
    for name, found in result["by_tower"].items():
        cosines = [values[name] for values in result["per_image"].values()]
        assert cosines[4] is None and cosines[5] is None
        assert cosines[0] == pytest.approx(1, abs=1e-5)
        assert found["n"] == 6 and found["mean"] == pytest.approx(100 * sum(cosines[:4]) / 6)
        assert found["low"] < found["mean"] < found["high"]
    means = [found["mean"] for found in result["by_tower"].values()]
    assert result["overall"] == pytest.approx(np.mean(means))
    low, high = result["overall_interval"]
    assert low < result["overall"] < high


def test_compat_drops_them_as_the_official_script(results):
    result, _ = results[True]
    for name, found in result["by_tower"].items():
        cosines = [values[name] for values in result["per_image"].values()]
        assert found["n"] == 4 and found["mean"] == pytest.approx(100 * np.mean(cosines[:4]))
        statistics = result["statistics_by_model"][name]
        assert statistics["total_images"] == 6 and statistics["valid_pairs"] == 4
        assert statistics["average_similarity"] == pytest.approx(np.mean(cosines[:4]))
        assert statistics["min_similarity"] == min(cosines[:4])
        assert result["similarities_by_model"][name]["5.png"] is None
    summary = result["summary"]
    assert summary["overall_average"] == pytest.approx(result["overall"] / 100)
    assert set(summary) == {
        "models_used", "average_scores_by_model", "overall_average", "best_model", "worst_model",
    }  # fmt: skip
    assert len(result["missing"]) == 2


def test_paired_comparison_and_control(results):
    result, _ = results[True]
    for name, moved in result["against"]["difference"].items():
        mine = result["overall"] if name == "overall" else result["by_tower"][name]["mean"]
        assert moved["low"] <= moved["mean"] <= moved["high"]
        if name != "overall":  # over the four that both have
            other = [100 * result["against"]["per_image"][f"{i}.png"][name] for i in range(4)]
            assert moved["mean"] == pytest.approx(mine - np.mean(other))
    whole, _ = results[False]
    for name, found in whole["by_tower"].items():
        expected = found["mean"] - whole["against"]["by_tower"][name]["mean"]
        assert whole["against"]["difference"][name]["mean"] == pytest.approx(expected)
        assert whole["controls"]["another_source"][name] < found["mean"] * 6 / 4


def test_files_hold_the_same_numbers(results):
    result, out = results[False]
    assert json.loads((out / "unified_bench.json").read_text()) == json.loads(json.dumps(result))
    rows = list(csv.DictReader((out / "unified_bench.csv").open()))
    assert [row["source"] for row in rows] == [f"{i}.png" for i in range(6)]
    assert float(rows[1]["clip"]) == pytest.approx(result["per_image"]["1.png"]["clip"], abs=1e-6)
    assert rows[5]["clip"] == "" and rows[5]["failure"] == "no reconstruction"
    text = (out / "unified_bench.md").read_text()
    assert f"| **overall** | {result['overall']:.2f} |" in text and "2 missing, 1 unpaired" in text


def test_pairing_prefers_the_name_then_the_stem(tmp_path):
    sources = [tmp_path / name for name in ("a.jpg", "a.png", "b.jpg")]
    found = pairing.pair(sources, [tmp_path / name for name in ("x/a.png", "x/b.webp", "x/recon_b.png", "x/c.png")])
    assert found.chosen == {sources[1]: tmp_path / "x/a.png", sources[2]: tmp_path / "x/b.webp"}
    assert found.missing == [sources[0]]
    assert found.unpaired == [tmp_path / "x/c.png"] and found.duplicates == [tmp_path / "x/recon_b.png"]


def test_bad_input(towers, pictures, tmp_path):
    def run(sources="sources", reconstructions="good", **named):
        unified_bench.run(pictures / sources, pictures / reconstructions, named or towers, tmp_path, batch_size=2)

    with pytest.raises(UserError, match=r"--sources.*is no folder"):
        run(sources="nowhere")
    save(tmp_path / "other/zzz.png", picture(1))
    with pytest.raises(UserError, match="--reconstructions: no readable file"):
        unified_bench.run(pictures / "sources", tmp_path / "other", towers, tmp_path)
    with pytest.raises(UserError, match="holds a CLIPModel, which is no dinov2"):
        run(dinov2=towers["clip"])
    with pytest.raises(UserError, match=r"no config\.json"):
        run(clip=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        pairing.find(tmp_path / "empty", "--sources")


def test_command_line(towers, pictures, tmp_path, capsys):
    where = ",".join(f"{name}={path}" for name, path in towers.items())
    flags = [f"--sources={pictures}/sources", f"--reconstructions={pictures}/bad", f"--out={tmp_path}"]
    evaluate.main(["evaluate", "unified_bench", *flags, f"--towers={where}"])
    printed = capsys.readouterr()
    assert "| **overall** |" in printed.out and "1 other_size" in printed.out
    assert "warning: 1 of 6 reconstructions have another size" in printed.err
    result = json.loads((tmp_path / "unified_bench.json").read_text())
    assert result["missing"] == []
    assert result["other_size"] == [{"source": "5.png", "size": [30, 24], "reconstruction": [30, 12]}]
    for arguments, message in (
        (["unified_bench", *flags, "--towers=clip"], "not NAME=DIR"),
        (["unified_bench", *flags, "--towers=a=b,a=c"], "twice"),
        (["geneval3"], "name one benchmark"),
        (["unified_bench", "--sources=", *flags[1:], f"--towers={where}"], "needs --sources"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["evaluate", *arguments])
