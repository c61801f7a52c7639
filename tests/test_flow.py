"""Flow matching: schedules, guidance and the Euler integrator."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.sampling import flow

SHAPE = (2, 3, 4, 4, 3)  # b g height width channels


def draw(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


DATA, NOISE = draw(0), draw(1)


@pytest.mark.parametrize("spacing", ["uniform", "diffusers"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_levels_fall_from_one_to_zero(steps, shift, spacing):
    levels = flow.sigmas(steps, shift, spacing)
    assert levels.shape == (steps + 1,) and levels.dtype == np.float32
    assert levels[0] == 1 and levels[-1] == 0 and (np.diff(levels) < 0).all()


def test_levels_by_hand():
    np.testing.assert_allclose(flow.sigmas(4, 1.0, "uniform"), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)
    # 3 s / (1 + 2 s)
    np.testing.assert_allclose(flow.sigmas(4, 3.0, "uniform"), [1, 0.9, 0.75, 0.5, 0], atol=1e-7)
    # linspace(1, s, 2) with s = shifted(1 / 1000), shifted again
    lowest = 0.003 / 1.002
    np.testing.assert_allclose(flow.sigmas(2, 3.0, "diffusers"), [1, 3 * lowest / (1 + 2 * lowest), 0], atol=1e-7)


def test_unknown_names():
    with pytest.raises(ValueError, match="karras"):
        flow.sigmas(4, 1.0, "karras")
    with pytest.raises(ValueError, match="epsilon"):
        flow.to_velocity(jnp.zeros(1), jnp.zeros(1), jnp.float32(1), "epsilon")


@pytest.mark.parametrize("kind", ["velocity", "sample"])
@pytest.mark.parametrize("steps, shift, spacing", [(1, 1.0, "uniform"), (3, 3.0, "uniform"), (20, 3.0, "diffusers")])
def test_the_exact_model_of_a_straight_path_recovers_the_data(steps, shift, spacing, kind):
    prediction = NOISE - DATA if kind == "velocity" else DATA
    seen = flow.sigmas(steps, shift, spacing)

    def velocity(x, sigma):
        return flow.to_velocity(jnp.asarray(prediction), x, sigma, kind)

    found = jax.jit(lambda noise: flow.euler(velocity, noise, seen))(NOISE)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, DATA, atol=1e-5)


def test_a_sample_prediction_is_the_velocity_of_its_path():
    sigma = np.float32(0.3)
    x = (1 - sigma) * DATA + sigma * NOISE
    np.testing.assert_allclose(flow.to_velocity(DATA, x, sigma, "sample"), NOISE - DATA, atol=1e-5)
    assert flow.to_velocity(DATA, x, sigma, "velocity") is DATA


def test_euler_steps_through_the_levels_in_order():
    """Against a loop in NumPy, on a field that depends on x and sigma; bfloat16 models integrate in float32."""
    levels = flow.sigmas(5, 3.0, "uniform")
    x = NOISE.astype(float)
    for sigma, following in itertools.pairwise(levels):
        x = x + (np.sin(x) + 2 * sigma) * (following - sigma)
    np.testing.assert_allclose(flow.euler(lambda x, s: jnp.sin(x) + 2 * s, NOISE, levels), x, atol=1e-5)
    half = flow.euler(lambda x, s: (jnp.sin(x) + 2 * s).astype(jnp.bfloat16), NOISE, levels)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - x).max() < 0.05


def test_guidance():
    a, b = jnp.asarray(DATA), jnp.asarray(NOISE)
    np.testing.assert_allclose(flow.guided(a, b, 1.0), a, atol=1e-6)
    np.testing.assert_allclose(flow.guided(a, b, 0.0), b, atol=1e-6)
    np.testing.assert_allclose(flow.guided(a, b, 4.5), DATA + 3.5 * (DATA - NOISE), atol=1e-5)
