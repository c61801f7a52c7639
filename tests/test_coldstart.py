"""The cold start from nothing to weights that RL can load, in two steps a stage."""

import json

import numpy as np
import pytest

from tests import tiny
from uae_jax import pixels, sharding, system, train
from uae_jax.convert import folder
from uae_jax.data.shapes.scene import sample_scene
from uae_jax.stages import coldstart, decoder, tower


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coldstart")
    train.run(tiny.coldstart_config(), folder)
    return folder


@pytest.mark.slow
def test_stages_leave_weights_that_load_and_a_card(workdir):
    for stage, steps in (("tower", 2), ("bench_tower", 2), ("captioner", 3), ("decoder", 2)):
        rows = (workdir / stage / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
        assert all(np.isfinite(json.loads(row)["loss"]) for row in rows)
    loaded = tiny.config(workdir / "weights", monitor=("clip_second", "dinov2", "siglip"))
    built = system.load(loaded, sharding.make_mesh(loaded))
    matrix = np.asarray(built.frozen["projector"]["matrix"])
    assert np.abs(matrix - np.eye(len(matrix))).max() > 0.1  # the whitening was fitted
    card = (workdir / "weights" / "CARD.md").read_text()
    for said in ("configs/tiny_coldstart.py", "seed 0", "ground truth", "SD3Transformer2DModel", "reward_ceiling"):
        assert said in card


@pytest.mark.slow
def test_the_bench_towers_see_scenes_at_their_own_size(workdir):
    for name in ("dinov2", "siglip"):
        how = pixels.load(workdir / "weights" / name, folder.open_model(workdir / "weights" / name).config)
        assert how.size == 48 and how.shortest in (None, 48)


@pytest.mark.slow
def test_a_stage_runs_alone_and_resumes(workdir):
    before = (workdir / "captioner" / "metrics.jsonl").read_text()
    (workdir / "weights" / "captioner" / "model.safetensors").unlink()
    train.run(tiny.coldstart_config(stage="captioner"), workdir)
    assert (workdir / "captioner" / "metrics.jsonl").read_text() == before
    assert (workdir / "weights" / "captioner" / "model.safetensors").is_file()


def test_whitening_gives_unit_variance_and_is_symmetric():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 6)) * np.array([3, 1, 1, 0.5, 2, 1]) + 5.0
    mean, matrix = decoder.whitening(states)
    white = (states - mean) @ matrix
    np.testing.assert_allclose(np.cov(white, rowvar=False), np.eye(6), atol=1e-3)
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)


def test_neighbours_differ_in_one_attribute():
    rng = np.random.default_rng(0)
    for i in range(200):
        scene = sample_scene(0, i)
        other = tower.neighbour(scene, rng)
        assert len(other.objects) == len(scene.objects)
        assert len({o.cell for o in other.objects}) == len(other.objects)
        kept = len(set(scene.objects) & set(other.objects))
        changed = int(scene.background != other.background)
        assert (kept, changed) in {(len(scene.objects) - 1, 0), (len(scene.objects), 1)}


def test_scene_batches_are_a_function_of_seed_and_step():
    fields = lambda scenes, rng, step: {"draw": rng.random(len(scenes))}  # noqa: E731
    one, other = (coldstart.SceneBatches(3, 4, 48, fields, coldstart.growing_scenes(8)) for _ in range(2))
    _ = other[7]
    for name in ("image", "draw"):
        np.testing.assert_array_equal(one[5][name], other[5][name])
        assert (one[5][name] != one[6][name]).any()
