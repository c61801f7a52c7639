"""Stage tokenizer: codes come from the data and none stays dead; what is written draws scenes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_ar_coldstart, tiny_coldstart
from tests import tiny
from uae_jax import sharding, train
from uae_jax.convert import folder
from uae_jax.data.shapes.render import render
from uae_jax.data.shapes.scene import sample_scene
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.janus.vq import VQModel
from uae_jax.stages import tokenizer
from uae_jax.stages.build import build

STEPS = 60


def config(**changes):
    c = tiny_ar_coldstart.get_config()
    c.unlock()
    c.data.image_size = 12
    c.models.tokenizer.channel_multiplier = [1, 1]
    c.models.tokenizer.num_embeddings = 64
    c.models.tokenizer.latent_channels = 32
    c.tokenizer.steps = STEPS
    c.tokenizer.batch_size = 16
    c.tokenizer.optimizer.learning_rate = 1e-2
    c.tokenizer.optimizer.warmup = 4
    return tiny.changed(c, {"stage": "tokenizer", **changes})


@pytest.mark.slow
def test_it_learns_to_draw_scenes_through_codes(tmp_path):
    train.run(config(), tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "tokenizer" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["bad_steps"] == 0
    found = folder.load_model(tmp_path / "weights" / "tokenizer")
    images = np.stack([render(sample_scene(1, i), 12) for i in range(16)]).astype(np.float32) / 127.5 - 1
    drawn = jax.jit(lambda params, x: apply(VQModel(found.config), params, x))(found.params, images)
    # Better than one colour, the best that codes without a meaning could do.
    assert ((np.asarray(drawn) - images) ** 2).mean() < 0.3 * images.var((0, 1, 2)).mean()


def test_pixels_reach_the_encoder_through_codes_and_unused_codes_are_placed():
    # Without the pull to the codes, only the straight-through gradient moves the encoder.
    c = config(tokenizer__commitment=0.0, tokenizer__optimizer__warmup=0)
    program = tokenizer.build(c, Path(), sharding.make_mesh(c))
    batch = program.batches[0]
    before = jax.device_get(program.state.params["tokenizer"])
    state, metrics = jax.jit(program.step)(program.state, {}, batch)
    after = jax.device_get(state.params["tokenizer"])
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before["encoder"]["conv_in"], after["encoder"]["conv_in"])
    assert min(moved.values()) > 0
    placed = (np.abs(np.linalg.norm(after["codebook"], axis=-1) - 1) < 1e-5).sum()
    assert 0 < metrics["codes/restarted"] == placed
    assert (state.params["usage"] >= 1).all()


def test_dead_codes_restart_where_latents_are_badly_met():
    rng = np.random.default_rng(0)
    codebook, latents = rng.standard_normal((6, 3)), rng.standard_normal((2, 2, 5, 3))
    usage = jnp.array([3.0, 0.0, 1.0, 0.4, 0.1, 40.0])
    error = np.zeros((2, 2, 5))
    error[0, 1, 2], error[1, 0, 4] = 1.0, 0.5
    moved, counts = tokenizer.restarted(jax.random.key(0), jnp.asarray(codebook), usage, jnp.asarray(latents), error)
    alive = np.array([0, 2, 5])
    np.testing.assert_array_equal(moved[alive], codebook[alive].astype(np.float32))
    np.testing.assert_array_equal(counts, [3.0, 1.0, 1.0, 1.0, 1.0, 40.0])
    bad = np.stack([latents[0, 1, 2], latents[1, 0, 4]]).astype(np.float32)
    for code in np.asarray(moved)[[1, 3, 4]]:
        assert (code == bad).all(-1).any()


def test_a_config_without_a_tokenizer(tmp_path):
    c = tiny_coldstart.get_config()
    with pytest.raises(UserError, match=r"config.tokenizer, as configs/tiny_ar_coldstart.py"):
        build("tokenizer", c, tmp_path, sharding.make_mesh(c))
