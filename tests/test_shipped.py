"""The weights that come with the package: small, documented, and as good as their card says."""

import re

import jax
import numpy as np
import pytest

from configs import tiny, tiny_ar
from uae_jax import pixels, rewards, sharding, system
from uae_jax.bench.held_out import Evaluator
from uae_jax.convert import folder
from uae_jax.data.shapes import grammar
from uae_jax.data.shapes.render import render
from uae_jax.data.shapes.scene import sample_scene, split_seed
from uae_jax.stages import rl, tower
from uae_jax.step import STARTING_WEIGHTS


@pytest.mark.parametrize("name,most", [("tiny", 20e6), ("tiny_ar", 10e6)])
def test_shipped_weights_are_small_and_safe(name, most):
    files = [path for path in folder.shipped(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}


@pytest.mark.parametrize("name,world", [("tiny", tiny), ("tiny_ar", tiny_ar)])
def test_shipped_weights_do_what_their_card_says(name, world):
    config = world.get_config()
    config.data.held_out = config.eval.batch_size = 32
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    _, images, scenes = rl.load_data(config)
    evaluator = Evaluator(config, built, mesh, images, scenes)
    card = (folder.shipped(name) / "CARD.md").read_text()
    ceiling = float(re.search(r"\| reward_ceiling \| ([\d.]+)", card)[1])
    # 32 scenes of the card's 256.
    earned = evaluator.reward_of_texts(STARTING_WEIGHTS, [grammar.complete(s) for s in scenes])
    assert abs(earned.mean() - ceiling) < 0.03
    tokens, mask, truncated = evaluator.write(STARTING_WEIGHTS)
    assert not truncated.any() and mask.sum(1).mean() < 13
    texts = [built.tokenizer.decode(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]
    described = [grammar.parse(text) for text in texts]
    assert all(d is not None for d in described)
    named = np.mean([d.background == s.background for d, s in zip(described, scenes, strict=True) if d])
    assert named > 0.95


def test_the_bench_towers_tell_scenes_apart():
    """Another scene, or the scene with one attribute changed, is less alike than the scene with noise."""
    scenes = [sample_scene(split_seed(5, "eval"), i) for i in range(48)]
    rng = np.random.default_rng(0)
    pictures, changed = (
        np.stack([render(s, 48) for s in part]) / np.float32(255)
        for part in (scenes, [tower.neighbour(s, rng) for s in scenes])
    )
    noisy = np.clip(pictures + rng.normal(0, 0.02, pictures.shape), 0, 1).astype(np.float32)
    for name in ("dinov2", "siglip"):
        where = folder.shipped("tiny") / name
        model = folder.load_model(where)
        features = jax.jit(rewards.tower(model.config, np.float32, pixels.load(where, model.config)))
        own, other, same = (np.asarray(features(model.params, x)) for x in (pictures, changed, noisy))
        cosines = own @ own.T
        assert abs(cosines[~np.eye(48, dtype=bool)].mean()) < 0.2
        assert ((own * same).sum(-1) > (own * other).sum(-1)).mean() > 0.9
        assert ((own @ same.T).argmax(1) == np.arange(48)).all()
