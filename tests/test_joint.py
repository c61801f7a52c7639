"""Stage `joint` on an untrained image tokenizer: it leaves weights that RL loads, and learns what it should."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from uae_jax import sharding, system, train
from uae_jax.convert import folder
from uae_jax.data.shapes import tokenizer
from uae_jax.models import initial
from uae_jax.models.janus.vq import VQModel
from uae_jax.stages import joint
from uae_jax.stages.coldstart import model_config


@pytest.fixture(scope="module")
def workdir(weights, tmp_path_factory):
    """After both phases, on towers of the other world."""
    where = tmp_path_factory.mktemp("joint")
    config = tiny.ar_coldstart_config(stage="joint", towers=str(weights))
    vq = VQModel(model_config(config, "tokenizer"))
    params = initial(vq, jax.random.key(3), jnp.zeros((1, 48, 48, 3)))
    folder.save_model(where / "weights" / "tokenizer", vq.config, params, np.float16)
    train.run(config, where)
    return where


def test_joint_leaves_weights_that_load_and_a_card(workdir, weights):
    rows = [json.loads(row) for row in (workdir / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite([row["loss"], row["loss/caption"], row["loss/image"]]).all() for row in rows)
    assert 0 <= rows[-1]["perception"] <= 1 and -1 <= rows[-1]["ceiling"] <= 1
    config = tiny.ar_config(workdir / "weights", weights)
    built = system.load(config, sharding.make_mesh(config))
    # The image tokenizer is the one that was there, to the bit.
    vq = folder.load_model(workdir / "weights" / "tokenizer").params
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(built.frozen["start"]["vq"]), vq)
    card = (workdir / "weights" / "CARD.md").read_text()
    for said in ("configs/tiny_ar_coldstart.py", "seed 0", "ground truth", "JanusForCond", "reward_ceiling"):
        assert said in card


def test_batches_hide_captions_and_become_terse(workdir, weights):
    config = tiny.ar_coldstart_config(towers=str(weights), eval__enabled=False, joint__batch_size=64)
    program = joint.build(config, workdir, tokenizer.build(), sharding.make_mesh(config))
    seen, terse = program.batches[0], program.batches[2]
    assert seen["mask"].sum(1).mean() > 1.3 * terse["mask"].sum(1).mean()
    assert 0 < seen["hidden"].mean() < 0.3
    assert len(set(terse["length"].tolist())) > 5  # what is drawn is of any length in both phases
