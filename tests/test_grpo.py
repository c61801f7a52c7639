"""The objective: against NumPy in float64, and the properties that training leans on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uae_jax import grpo

patient = settings(deadline=None, max_examples=50)  # the first example compiles
CLIP = {"clip_low": 0.1, "clip_high": 0.4}


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    """No subnormal numbers: XLA takes them for zero."""
    return st.floats(low, high, width=32, allow_subnormal=False)


# ---- loss ------------------------------------------------------------------------------------------------------------


def reference(new, old, ref, advantage, weight, beta):
    """One action's share of the loss, its k3 and whether it is clipped, case by case in Python's float64."""
    ratio = np.exp(min(max(new - old, -20.0), 20.0))
    low, high = 1 - CLIP["clip_low"], 1 + CLIP["clip_high"]
    policy = ratio * advantage
    clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    if clipped:
        policy = (high if advantage > 0 else low) * advantage
    d = min(max(ref - new, -20.0), 20.0)
    k3 = np.exp(d) - d - 1
    return -weight * (policy - beta * k3), k3 if weight else 0.0, float(clipped and weight > 0)


# new - old (below, inside, above the clip; beyond 20 both ways), ref - new, advantage, weight, beta.
CASES = np.array(
    list(
        itertools.product(
            (-25.0, -1.0, -0.2, -0.05, 0.0, 0.2, 0.5, 3.0, 25.0),
            (-25.0, -0.7, 0.0, 0.4, 25.0),
            (1.25, -0.75, 0.0),
            (0.0, 0.5),
            (0.0, 0.25),
        )
    )
)
OLD = -2.5


@functools.lru_cache
def ours():
    """Loss, kl, clipped and d loss / d new of every case, each as a batch of one action."""

    def one(new, old, ref, advantage, weight, beta):
        def total(new):
            out = grpo.loss(
                *(x[None, None, None] for x in (new, old, ref)), advantage[None, None], weight[None, None, None],
                **CLIP, beta=beta,
            )  # fmt: skip
            return out.loss, out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(new)
        return *out, gradient

    ratio, kl, advantage, weight, beta = jnp.asarray(CASES, jnp.float32).T
    new = OLD + ratio
    return [
        np.asarray(x) for x in jax.jit(jax.vmap(one))(new, jnp.full_like(new, OLD), new + kl, advantage, weight, beta)
    ]


def test_loss_matches_numpy_case_by_case():
    expected = np.array([reference(OLD + r, OLD, OLD + r + d, a, w, b) for r, d, a, w, b in CASES]).T
    for found, value in zip(ours(), expected, strict=False):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    clipped = ours()[2]
    assert 0 < clipped.sum() < len(clipped)


def test_gradient_matches_central_differences():
    h = 1e-5
    for (r, d, a, w, b), gradient in zip(CASES, ours()[3], strict=True):
        new, ref = OLD + r, OLD + r + d
        above, below = (reference(new + s, OLD, ref, a, w, b)[0] for s in (h, -h))
        # Rounding of the two float64 values counts where a log-ratio is clipped: they are near exp(20) there.
        rounding = 4 * np.finfo(float).eps * abs(above) / h
        assert np.isclose(gradient, (above - below) / (2 * h), rtol=1e-5, atol=1e-6 + rounding), (r, d, a, w, b)


def test_gradient_is_cut_exactly_where_the_clip_says():
    gradient = {(r, a): g for (r, d, a, w, b), g in zip(CASES, ours()[3], strict=True) if (d, w, b) == (0.0, 0.5, 0.0)}
    for (r, a), g in gradient.items():
        acts = a != 0 and abs(r) < 20 and (r < np.log(1.4) if a > 0 else r > np.log(0.9))
        assert (g != 0) == acts, (r, a)
        if acts:
            assert np.isclose(g, -0.5 * a * np.exp(r), rtol=1e-5)


def test_gradient_flows_through_new_alone():
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 5)) * 0.2

    def total(new, old, ref, advantage, weights):
        return grpo.loss(new, old, ref, advantage, weights, **CLIP, beta=0.3).loss

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*np.asarray(x[:3]), x[3, ..., 0], jnp.ones((2, 3, 5)))
    assert jnp.abs(gradients[0]).min() > 0
    assert not any(g.any() for g in gradients[1:])


def test_actions_without_weight_may_hold_anything_finite():
    rng = np.random.default_rng(0)
    new, old, ref = rng.normal(size=(3, 2, 3, 5)).astype(np.float32)
    advantage = rng.normal(size=(2, 3)).astype(np.float32)
    mask = np.arange(5) < rng.integers(1, 5, (2, 3, 1))
    weights = grpo.action_weights(jnp.asarray(mask), "token")

    @jax.jit
    def run(new, old, ref):
        def total(new):
            out = grpo.loss(new, old, ref, advantage, weights, **CLIP, beta=0.1)
            return out.loss, out

        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(new)
        return *out, gradient

    wild = [np.where(mask, x, y).astype(np.float32) for x, y in ((new, 3e38), (old, -3e38), (ref, 1e9))]
    for plain, other in zip(run(new, old, ref), run(*wild), strict=True):
        assert np.array_equal(plain, other)
        assert plain.ndim == 0 or not np.any(np.asarray(other)[~mask])


def test_loss_is_float32_whatever_comes_in():
    x = jnp.full((1, 2, 3), -1.0, jnp.bfloat16)
    out = grpo.loss(x, x, x, jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2, 3)), **CLIP, beta=0.1)
    assert all(value.dtype == jnp.float32 for value in out)


# ---- k3 --------------------------------------------------------------------------------------------------------------


def test_log_ratio_is_clipped_at_20():
    found = grpo.log_ratio(jnp.array([0.0, 19.5, 20.5, -20.5, 3e38]), jnp.array([0.0, 0, 0, 0, -3e38]))
    assert found.tolist() == [0.0, 19.5, 20.0, -20.0, 20.0]


K3 = jax.jit(grpo.k3)
wide = floats(-(2.0**100), 2.0**100)


@patient
@given(hnp.arrays(np.float32, (2, 64), elements=wide | floats(-1, 0)))
def test_k3_is_never_negative(pair):
    assert (np.asarray(K3(*pair)) >= 0).all()


@patient
@given(hnp.arrays(np.float32, 64, elements=floats(-1, 1)), st.integers(0, 30))
def test_k3_of_a_policy_near_its_reference(difference, power):
    """The case of every run's start: exp(d) - d - 1 in float32 would be noise, of either sign."""
    difference = difference * np.float32(2.0**-power)
    found = np.asarray(K3(np.zeros(64, np.float32), difference))
    d = difference.astype(float)
    expected = np.where(np.abs(d) < 1e-4, d**2 / 2 + d**3 / 6, np.expm1(d) - d)
    assert (found >= 0).all()
    assert (np.abs(found - expected) <= 1e-6 * np.abs(d) + 1e-44).all()


# ---- weights ---------------------------------------------------------------------------------------------------------

NORMALISERS = ("constant", "sequence", "token")


def draw_mask(seed=0, b=4, g=3, t=6):
    mask = np.arange(t) < np.random.default_rng(seed).integers(1, t + 1, (b, g, 1))
    mask[1, 2] = False  # a sample that is masked out
    return mask


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_weights_turn_a_sum_into_the_mean(normaliser):
    mask = draw_mask()
    x = np.random.default_rng(1).normal(size=mask.shape)
    samples = [x[i][mask[i]] for i in np.ndindex(mask.shape[:2]) if mask[i].any()]
    expected = {
        "constant": np.mean([s.sum() / mask.shape[-1] for s in samples]),
        "sequence": np.mean([s.mean() for s in samples]),
        "token": np.mean(np.concatenate(samples)),
    }[normaliser]
    weights = np.asarray(grpo.action_weights(jnp.asarray(mask), normaliser))
    assert weights.dtype == np.float32 and not weights[~mask].any()
    assert np.isclose((weights * x).sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_nothing_counts(normaliser):
    assert not np.asarray(grpo.action_weights(jnp.zeros((2, 3, 4), bool), normaliser)).any()


def test_unknown_normaliser():
    with pytest.raises(ValueError, match="median"):
        grpo.action_weights(jnp.ones((1, 2, 3), bool), "median")


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_microbatches_add_up_to_the_batch(normaliser):
    """Loss, metrics and gradient with respect to shared parameters, for unequal lengths in the parts."""
    mask = jnp.asarray(draw_mask())
    rng = np.random.default_rng(0)
    features, advantage = (rng.normal(size=(*mask.shape[:n], n)).astype(np.float32) for n in (3, 2))
    advantage = advantage[..., 0]
    old, ref = rng.normal(size=(2, *mask.shape)).astype(np.float32) * 0.3
    weights = np.asarray(grpo.action_weights(mask, normaliser))
    w = np.array([0.2, -0.3, 0.1], np.float32)

    @jax.jit
    def run(*part):
        def total(w):
            features, old, ref, advantage, weights = part
            out = grpo.loss(features @ w, old, ref, advantage, weights, **CLIP, beta=0.2)
            return out.loss, out

        return jax.grad(total, has_aux=True)(w)

    everything = (features, old, ref, advantage, weights)
    whole = run(*everything)
    parts = [run(*(x[m::2] for x in everything)) for m in range(2)]
    for total, a, b in zip(*(jax.tree.leaves(x) for x in (whole, *parts)), strict=True):
        np.testing.assert_allclose(total, a + b, rtol=1e-5, atol=1e-6)
    # Weights made for each part alone would be another objective: the test must be able to tell.
    alone = [grpo.action_weights(mask[m::2], normaliser) for m in range(2)]
    assert any(not np.allclose(alone[m], weights[m::2]) for m in range(2))


# ---- advantages ------------------------------------------------------------------------------------------------------


def expected_advantages(rewards, valid, eps, scale):
    out = np.zeros(rewards.shape)
    for i, (row, keep) in enumerate(zip(rewards.astype(float), valid, strict=True)):
        if keep.any():
            out[i, keep] = row[keep] - row[keep].mean()
            if scale:
                out[i, keep] /= row[keep].std(ddof=0) + eps
    return out


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_advantages_match_numpy(eps, scale):
    rng = np.random.default_rng(0)
    rewards = rng.uniform(-1, 1, (8, 6)).astype(np.float32)
    valid = rng.random((8, 6)) < 0.7
    valid[:2] = True
    found, flat = grpo.advantages(rewards, jnp.asarray(valid), eps=eps, scale_by_std=scale)
    np.testing.assert_allclose(found, expected_advantages(rewards, valid, eps, scale), rtol=1e-4, atol=1e-5)
    assert found.dtype == jnp.float32
    assert flat.tolist() == (valid.sum(-1) < 2).tolist()


def test_advantages_by_hand():
    """Population, not sample, standard deviation."""
    found, _ = grpo.advantages(jnp.array([[0.0, 1.0, 2.0, 3.0]]), jnp.ones((1, 4), bool), eps=0.0)
    np.testing.assert_allclose(found[0], np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25), rtol=1e-6)


ADVANTAGES = jax.jit(grpo.advantages)


@pytest.mark.parametrize("g", [3, 5, 6, 7, 11])
@patient
@given(data=st.data())
def test_flat_groups_have_advantage_exactly_zero(g, data):
    rewards = data.draw(hnp.arrays(np.float32, (16, 1), elements=wide | floats(-1, 1)))
    valid = data.draw(hnp.arrays(bool, (16, g)))
    found, flat = ADVANTAGES(np.where(valid, rewards, np.nan), valid)
    assert not np.asarray(found).any() and np.asarray(flat).all()


def test_float_rounding_of_the_mean_would_not_cancel():
    """The examples above hold equal rewards whose float32 mean is another number; 1 / eps would blow that up."""
    rewards = np.linspace(0.1, 0.9, 64, dtype=np.float32)[:, None] * np.ones((64, 7), np.float32)
    naive = jnp.asarray(rewards) - jnp.asarray(rewards).sum(-1, keepdims=True) / 7
    assert jnp.abs(naive).max() > 0
    found, flat = ADVANTAGES(rewards, np.ones((64, 7), bool))
    assert not np.asarray(found).any() and np.asarray(flat).all()


unit = hnp.arrays(np.float32, (4, 5), elements=floats(-1, 1))


@patient
@given(unit, hnp.arrays(bool, (4, 5)), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_invalid_rewards_change_nothing_else(rewards, valid, poison):
    found, flat = ADVANTAGES(np.where(valid, rewards, np.float32(poison)), valid)
    plain, plain_flat = ADVANTAGES(np.where(valid, rewards, 0), valid)
    assert np.array_equal(found, plain) and np.array_equal(flat, plain_flat)
    assert np.isfinite(found).all() and not np.asarray(found)[~valid].any()
    for i, keep in enumerate(valid):
        kept = rewards[i][keep]
        assert bool(flat[i]) == (len(np.unique(kept)) < 2)
        expected = expected_advantages(kept[None], np.ones((1, len(kept)), bool), 1e-4, True)[0]
        assert np.allclose(np.asarray(found)[i][keep], expected, rtol=1e-3, atol=3e-3)


@patient
@given(unit)
def test_advantages_are_centred_ordered_and_independent_of_neighbours(rewards):
    found = np.asarray(ADVANTAGES(rewards, np.ones((4, 5), bool))[0])
    assert np.abs(found.sum(-1)).max() < 5e-3
    for row, advantage in zip(rewards, found, strict=True):
        order = np.argsort(row, kind="stable")
        assert (np.diff(advantage[order]) >= 0).all()
    others = np.concatenate([rewards[:1], -rewards[1:] * 3])
    assert np.array_equal(np.asarray(ADVANTAGES(others, np.ones((4, 5), bool))[0])[0], found[0])


def test_no_nan_reaches_the_loss():
    """A NaN reward, through advantage and mask, as the step does it."""
    rewards = np.array([[0.2, np.nan, 0.6], [np.nan, np.inf, np.nan]], np.float32)
    valid = np.isfinite(rewards)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def total(new, rewards):
        valid = jnp.isfinite(rewards)
        advantage, _ = grpo.advantages(rewards, valid)
        weights = grpo.action_weights(jnp.ones((2, 3, 4), bool) & valid[..., None], "sequence")
        return grpo.loss(new, x, x, advantage, weights, **CLIP, beta=0.1).loss

    value, gradient = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(total))(x + 0.01, rewards))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not gradient[~valid].any() and gradient[0, 0].all()
