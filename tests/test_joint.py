"""The cold start of the autoregressive world in two steps a stage: it leaves weights that RL loads."""

import json

import jax
import numpy as np
import pytest

from tests import tiny
from uae_jax import sharding, system, train
from uae_jax.convert import __main__ as convert
from uae_jax.convert import folder
from uae_jax.data.shapes import tokenizer
from uae_jax.errors import UserError
from uae_jax.stages import joint


@pytest.fixture(scope="module")
def workdir(weights, tmp_path_factory):
    """After both stages, on towers of the other world."""
    where = tmp_path_factory.mktemp("joint")
    train.run(tiny.ar_coldstart_config(towers=str(weights)), where)
    return where


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_from_these_weights_evaluates_and_exports(workdir, weights, tmp_path):
    config = tiny.ar_config(
        workdir / "weights", weights, steps=2, train="both", text_encoder="live", redraw__same_noise=False,
        eval__enabled=True, eval__every=0, eval__batch_size=4, eval__pictures=2,
    )  # fmt: skip
    train.run(config, tmp_path / "run")
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ratio/max_abs_dev_first"] < 1e-4 and row["update_norm/decoder"] > 0 for row in rows)
    results = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert {"reward", "reward_ceiling", "perception", "redraw_accuracy"} <= results["after"].keys()
    convert.main(["", "export", str(tmp_path / "run"), str(tmp_path / "out")])
    before, after = (folder.load_model(path).params for path in (workdir / "weights" / "janus", tmp_path / "out"))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert any(jax.tree.leaves(moved.pop("language"))) and not any(jax.tree.leaves(moved))
    with pytest.raises(UserError, match="without --umm"):
        convert.main(["", "export", str(tmp_path / "run"), str(tmp_path / "other"), "--umm"])


@pytest.mark.slow
def test_batches_hide_captions_and_become_terse(tmp_path, weights):
    config = tiny.ar_coldstart_config(
        towers=str(weights), eval__enabled=False, joint__batch_size=64, joint__curriculum_steps=1, stage="tokenizer"
    )
    train.run(config, tmp_path)
    program = joint.build(config, tmp_path, tokenizer.build(), sharding.make_mesh(config))
    seen, terse = program.batches[1], program.batches[2]
    assert seen["mask"].sum(1).mean() > 1.3 * terse["mask"].sum(1).mean()
    assert 0 < seen["hidden"].mean() < 0.3
    assert len(set(terse["length"].tolist())) > 5  # what is drawn is of any length in both phases
