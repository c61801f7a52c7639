"""Noise levels and Euler steps against diffusers' FlowMatchEulerDiscreteScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.sampling import flow

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

STEPS = (1, 2, 4, 20, 28, 50)
SHIFTS = (1.0, 3.0)


def scheduler(steps: int, shift: float, spacing: str):
    """Set up as SD3's pipeline does (`diffusers`), or with the levels that FLUX's pipeline passes in (`uniform`)."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if spacing == "diffusers":
        reference.set_timesteps(steps)
    else:
        reference.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    return reference


@pytest.mark.parametrize("spacing", ["diffusers", "uniform"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_levels_and_timesteps(steps, shift, spacing):
    reference = scheduler(steps, shift, spacing)
    levels = flow.sigmas(steps, shift, spacing)
    assert levels.shape == tuple(reference.sigmas.shape)
    np.testing.assert_allclose(levels, reference.sigmas.numpy(), rtol=0, atol=2e-7)
    np.testing.assert_allclose(levels[:-1] * flow.TRAIN_TIMESTEPS, reference.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize("spacing", ["diffusers", "uniform"])
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_trajectory(steps, shift, spacing):
    """A field that depends on x and the level, so that a step at the wrong level shows."""
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    reference = scheduler(steps, shift, spacing)
    x = torch.from_numpy(noise)
    for timestep in reference.timesteps:
        velocity = torch.sin(3 * x) + 2 * timestep / 1000 - 0.3 * x
        x = reference.step(velocity, timestep, x).prev_sample
    levels = flow.sigmas(steps, shift, spacing)
    found = jax.jit(lambda z: flow.euler(lambda x, s: jnp.sin(3 * x) + 2 * s - 0.3 * x, z, levels))(noise)
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-5)
