"""Optimizer state and frozen weights in host memory: the same numbers, and there again after a step and a restore."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from uae_jax import checkpoint, rewards, sharding, system, train
from uae_jax.checkpoint import Checkpointer
from uae_jax.metrics import read


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def test_moments_come_over_and_go_back(tmp_path):
    mesh = jax.make_mesh((1, 1, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    rules = ((".*", sharding.Split.COPIED),)

    def start():
        return sharding.place({"w": jnp.ones((4, 8)), "m": jnp.ones((4, 8)), "count": jnp.int32(0)}, mesh, rules)

    def step(state, gradient):
        m = 0.9 * state["m"] + gradient
        return {"w": state["w"] - 0.1 * m, "m": m, "count": state["count"] + 1}, {"norm": jnp.linalg.norm(m)}

    there = start() | {"m": sharding.offloaded(start()["m"])}
    here, results = start(), []
    for state in (here, there):
        compiled = sharding.jit_step(step, state, mesh)
        for i in range(3):
            state, metrics = compiled(state, jnp.full((4, 8), 0.5 + i))
        assert compiled._cache_size() == 1, "a state that moved would be compiled again"
        results.append((state, metrics))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)
    state = results[1][0]
    assert kinds(state["m"]) == {sharding.HOST} and kinds(state["w"]) == {"device"}
    with Checkpointer(tmp_path, every=1) as saver:
        saver.save(1, state)
    restored = checkpoint.restore(tmp_path, 1, checkpoint.abstract(state))
    assert kinds(restored["m"]) == {sharding.HOST} and kinds(restored["w"]) == {"device"}
    np.testing.assert_array_equal(jax.device_get(restored["m"]), jax.device_get(state["m"]))
    shape = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=start()["m"].sharding)
    assert sharding.offloaded(shape).sharding.memory_kind == sharding.HOST


def test_frozen_weights_stay_there_and_are_used(weights):
    config = tiny.config(weights)
    mesh = sharding.make_mesh(config)
    built = system.load(config, mesh)
    there = system.offloaded(built.frozen)
    placed = sharding.place(there, mesh, built.rules)  # as the loop does with what it is given
    assert {name: kinds(part) for name, part in placed.items()} == {
        name: {sharding.HOST if name in ("projector", "transformer", "towers") else "device"} for name in built.frozen
    }
    images = jnp.asarray(tiny.scenes(2), jnp.float32) / 255.0
    features = jax.jit(lambda params: rewards.similarities(built.towers, params, images, images[:, None]))
    for name, value in features(built.frozen["towers"]).items():
        np.testing.assert_array_equal(value, features(placed["towers"])[name])
    moved = jax.make_jaxpr(sharding.fetched)(placed)
    assert all(out.memory_space == jax.memory.Space.Device for out in moved.out_avals)
    assert sum(aval.memory_space == jax.memory.Space.Host for aval in moved.in_avals) > 10


@pytest.mark.slow
def test_a_run_is_the_same(weights, tmp_path):
    for name, there in (("here", False), ("there", True)):
        config = tiny.config(
            weights, steps=2, offload_optimizer=there, offload_frozen=there,
            eval__enabled=True, eval__batch_size=4, eval__pictures=2,
        )  # fmt: skip
        train.run(config, tmp_path / name)
    rows = [[(row["loss"], row["reward/mean"]) for row in read(tmp_path / name)] for name in ("here", "there")]
    assert rows[0] == rows[1]
    evaluations = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("here", "there")]
    assert evaluations[0] == evaluations[1]
