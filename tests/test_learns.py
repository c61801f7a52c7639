"""The list that a run is held against: it passes an honest run and names each way to cheat."""

import numpy as np
import pytest

from benchmarks import learns
from uae_jax.bench.scores import Score, each

N = 400
RNG = np.random.default_rng(0)


def noisy(mean, spread=0.02):
    return each(mean + spread * RNG.normal(size=N))


def share(mean):
    """Right or wrong, image by image."""
    return Score((np.arange(N) < mean * N).astype(float), np.ones(N))


def honest():
    """Scores before and after a run that does what it should."""
    before = {
        "reward": noisy(0.4), "reward_second_tower": noisy(0.4), "reward_ceiling": each(np.full(N, 0.97)),
        "caption_length": noisy(8), "complete_length": noisy(21), "caption_malformed": share(0),
        "caption_recall": share(0.4), "caption_precision": share(0.9), "redraw_accuracy": share(0.4),
        "controls/with_true_background": noisy(0.41), "by_category/facts/small_objects/recall": share(0.3),
        "by_category/perception/shape": share(0.99), "by_category/perception/row": share(0.97),
    }  # fmt: skip
    after = before | {
        "reward": noisy(0.9), "reward_second_tower": noisy(0.9), "caption_length": noisy(20),
        "caption_recall": share(0.9), "redraw_accuracy": share(0.8),
        "by_category/facts/small_objects/recall": share(0.9),
    }  # fmt: skip
    return before, after


def failed(before, after, seconds=100.0):
    claims = learns.in_time(6) | learns.CLAIMS
    return {name for name, claim in claims.items() if not claim(before, after, seconds)[1]}


def test_an_honest_run_passes():
    assert failed(*honest()) == set()


@pytest.mark.parametrize(
    "changed,claim",
    [
        ({"caption_malformed": share(0.02)}, "malformed captions at most 1%"),
        ({"caption_precision": share(0.87)}, "precision of facts not down by more than 2 points"),
        ({"by_category/perception/row": share(0.9)}, "perception not down beyond its interval on any attribute"),
        ({"reward_second_tower": noisy(0.4)}, "the unseen tower agrees"),
        ({"redraw_accuracy": share(0.4)}, "the attribute judge agrees"),
        ({"caption_recall": share(0.5)}, "recall of facts up by at least 15 points"),
        ({"by_category/facts/small_objects/recall": share(0.4)}, "... of small objects too"),
        ({"reward": noisy(0.6)}, "at least half of the distance from start to ceiling"),
        ({"caption_length": noisy(7)}, "captions longer"),
    ],
)
def test_what_goes_wrong_in_training_is_named(changed, claim):
    before, after = honest()
    assert claim in failed(before, after | changed)


@pytest.mark.parametrize(
    "changed,claim",
    [
        ({"reward_ceiling": each(np.full(N, 0.89))}, "start: ceiling at least .90"),
        (
            {"by_category/perception/shape": share(0.94)},
            "start: forced-choice perception at least .95 on every attribute",
        ),
        ({"caption_length": noisy(11)}, "start: captions at most half as long as complete ones"),
        ({"controls/with_true_background": noisy(0.6)}, "gain beyond the background at least 80% of the gain"),
    ],
)
def test_a_bad_start_is_named(changed, claim):
    before, after = honest()
    assert claim in failed(before | changed, after)


def test_a_slow_run_is_named():
    assert failed(*honest(), seconds=361) == {"training under 6 minutes"}
