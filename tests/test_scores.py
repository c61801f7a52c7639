"""Scores by image: means of ratios, and paired intervals that mean what they say."""

import math

import numpy as np
import pytest

from uae_jax.bench import scores
from uae_jax.bench.scores import Score, each
from uae_jax.errors import UserError


def test_a_score_is_a_ratio_of_sums_not_a_mean_of_ratios():
    assert Score(np.array([1, 0]), np.array([1, 9])).mean == 0.1
    assert each([1.0, 2.0, 6.0]).mean == 3.0
    assert Score(np.zeros(3), np.zeros(3)).mean is None
    both = scores.total([Score(np.array([1, 2]), np.array([2, 2])), Score(np.array([0, 4]), np.array([4, 4]))])
    assert both.sums.tolist() == [1, 6] and both.counts.tolist() == [6, 6]


def test_intervals_cover_the_true_change_and_pairing_narrows_them():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(100):
        image = rng.normal(0, 1, 200)  # images differ much more than before and after do
        before, after = image + rng.normal(0, 0.1, 200), image + 0.05 + rng.normal(0, 0.1, 200)
        change = scores.change(each(before), each(after))
        covered += change.low <= 0.05 <= change.high
        widths.append(change.high - change.low)
        assert change.low <= change.mean <= change.high
    assert 88 <= covered <= 100
    expected = 2 * 1.96 * 0.1 * math.sqrt(2 / 200)
    assert expected * 0.85 < np.mean(widths) < expected * 1.15


def test_changes_that_cannot_be_told():
    nothing = Score(np.zeros(4), np.zeros(4))
    assert scores.change(nothing, each(np.ones(4))) is None
    alone = scores.change(each([1.0]), each([2.0]))
    assert alone.mean == 1.0 and math.isnan(alone.low)
    assert alone.json() == {"mean": 1.0, "low": None, "high": None}
    assert scores.change(each(np.ones(4)), each(np.ones(4))) == (0.0, 0.0, 0.0)
    rows = scores.table({"a": nothing, "b": each([0.5, 0.5])}, {"a": nothing, "b": each([1.0, 1.0])})
    assert rows == [["a", "-", "-", "-", "-"], ["b", "0.500", "1.000", "+0.500", "+0.500 to +0.500"]]


def test_saved_nested_and_pooled(tmp_path):
    first = {"reward": each([0.5, 0.25]), "controls/none": Score(np.array([1.0, 0.0]), np.array([2.0, 0.0]))}
    scores.save(tmp_path / "x.npz", first)
    loaded = scores.load(tmp_path / "x.npz")
    assert list(loaded) == list(first)
    assert all(np.array_equal(np.stack(loaded[name]), np.stack(first[name])) for name in first)
    together = scores.pooled([loaded, {"reward": each([1.0])}])
    assert list(together) == ["reward"] and together["reward"].sums.tolist() == [0.5, 0.25, 1.0]
    assert scores.nested({"a": 1, "b/c": 2, "b/d/e": 3}) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="missing"):
        scores.load(tmp_path / "missing.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="broken"):
        scores.load(tmp_path / "broken.npz")
