"""Reward hacking: the gap to a tower that only watches, and the run that it stops."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import tiny
from uae_jax import gap, metrics, report, sharding, train
from uae_jax.errors import UserError
from uae_jax.stages import Program, coldstart

HACKED = 25  # the step from which the reward's tower runs away


def config(bound: float, **others):
    values = {"reward": {"clip": 1.0, "clip*wellformed": 0.5}, "monitor": ("clip", "dinov2")}
    return types.SimpleNamespace(stop_on_gap=bound, **(values | others))


def rows(ahead: list[float]) -> list[dict[str, float]]:
    """Steps that differ much from each other, in which one tower is so far ahead of the other."""
    hard = np.random.default_rng(0).normal(0, 0.3, len(ahead))
    return [{"tower/clip": h + a, "tower/dinov2": h} for h, a in zip(hard, ahead, strict=True)]


def test_the_gap_is_counted_from_the_start_whatever_the_batches():
    found, why = gap.watch(config(0.0))(rows([0.1] * gap.START + [0.35]))
    assert found == {"gap/dinov2": pytest.approx(0.25)} and why is None
    assert gap.watch(config(0.0))(rows([0.7]))[0] == {"gap/dinov2": pytest.approx(0)}
    two = config(0.0, reward={"clip": 1.0, "siglip": 1.0}, monitor=("dinov2",))
    both = [row | {"tower/siglip": row["tower/dinov2"]} for row in rows([0.0] * 20 + [0.4])]
    assert gap.watch(two)(both)[0]["gap/dinov2"] == pytest.approx(0.2)


def test_only_a_lasting_gap_stops():
    watch = gap.watch(config(0.2))
    start, high = [0.0] * gap.START, [0.3] * gap.PATIENCE
    assert "0.300 more than 'dinov2'" in (watch(rows(start + high))[1] or "")
    assert watch(rows(start + high[1:]))[1] is None
    assert watch(rows([*start, *high[:5], 0.1, *high[1:]]))[1] is None
    assert watch(rows(start + [0.19] * 50))[1] is None
    assert watch(rows(start + [-0.5] * 50))[1] is None  # the watching tower may gain more


def test_something_must_be_compared():
    for others in ({"monitor": ("clip",)}, {"reward": {"length": 1.0}}):
        with pytest.raises(UserError, match="stop_on_gap"):
            gap.watch(config(0.1, **others))
        assert gap.watch(config(0.0, **others))([{}]) == ({}, None)


class Batches:
    def __getitem__(self, step):
        return {"image": np.zeros((1, 2, 2, 3), np.uint8)}


def test_a_hacked_run_stops_saved_and_stays_stopped(tmp_path):
    """A reward tower that is fooled from step 25 on; the message, the checkpoint, the metrics, and the same command."""
    ended = []

    def program(bound, honest=False):
        def step(state, frozen, batch):
            at = state.step + 1
            fooled = jnp.where(at >= HACKED, 0.0 if honest else 0.5, 0.0) + 0.01 * at
            return state.replace(step=at), {"tower/clip": fooled, "tower/dinov2": 0.01 * at, "reward/mean": fooled}

        return Program(
            state=coldstart.initial_state(jax.random.key(0), {"w": jnp.zeros(1)}, optax.sgd(0.1)),
            frozen={}, step=step, batches=Batches(), steps=60, columns={}, evaluate=lambda state, writer: {},
            finish=lambda state, writer: ended.append(int(state.step)), watch=gap.watch(config(bound)),
        )  # fmt: skip

    settings = tiny.config(tmp_path)
    mesh = sharding.make_mesh(settings)
    last = HACKED + gap.PATIENCE - 1
    (tmp_path / "hack").mkdir()
    for _ in range(2):  # and again: nothing more is trained
        assert not train.loop(program(0.3), settings, tmp_path / "hack", mesh)
        lines = metrics.read(tmp_path / "hack")
        assert [line["step"] for line in lines] == list(range(1, last + 1))
        assert (tmp_path / "hack/checkpoints" / str(last)).is_dir()
    assert ended == [last, last]
    assert lines[-1]["gap/dinov2"] == pytest.approx(0.5, abs=1e-6) and abs(lines[HACKED - 2]["gap/dinov2"]) < 1e-6
    # A bound that is not reached: it goes on from where it was.
    assert train.loop(program(0.6), settings, tmp_path / "hack", mesh)
    assert [line["step"] for line in metrics.read(tmp_path / "hack")] == list(range(1, 61))
    (tmp_path / "honest").mkdir()
    assert train.loop(program(0.3, honest=True), settings, tmp_path / "honest", mesh)

    run = report.Run(tmp_path, metrics.read(tmp_path / "hack"), {}, {})
    axes = {axis.get_title(): axis for axis in report.curves([run]).axes}
    assert axes["gap to dinov2"].lines[0].get_ydata().max() == pytest.approx(0.5, abs=1e-6)
