"""The stochastic sampler: its Gaussians, their log-probabilities, and what it samples."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.models import initial
from uae_jax.models.sd3.config import Config
from uae_jax.models.sd3.model import SD3Transformer
from uae_jax.sampling import flow, sde

BATCH, LATENT = (2, 3), (4, 4, 5)
LEVELS = flow.sigmas(10, 3.0, "diffusers")
NOISE = np.full(10, 0.7)
KEYS = jax.random.split(jax.random.key(7), BATCH)
INITIAL = np.random.default_rng(0).standard_normal((*BATCH, *LATENT)).astype(np.float32)


def field(x, s, np=jnp, scale=1.0):
    """A velocity that depends on x and the level, for JAX and for NumPy."""
    return scale * np.sin(3 * x) + 2 * s - 0.3 * x


def reference_step(x, velocity, s, following, largest, a):
    """Flow-GRPO's step as published, float64: mean and standard deviation."""
    dt = following - s
    std = a * np.sqrt(s / (1 - (largest if s == 1 else s)))
    mean = x * (1 + std**2 / (2 * s) * dt) + velocity * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return mean, std * np.sqrt(-dt)


def reference_log_prob(x, mean, std):
    density = -((x - mean) ** 2) / (2 * std**2) - np.log(std) - np.log(np.sqrt(2 * np.pi))
    return density.mean(axis=(-3, -2, -1))


@jax.jit
def sampled(initial, keys):
    return sde.sample(field, initial, LEVELS, NOISE, keys)


@pytest.fixture(scope="module")
def path():
    return jax.tree.map(np.asarray, sampled(INITIAL, KEYS))


def test_every_step_against_float64(path):
    """Means, deviations, drawn latents and log-probabilities, each step from the latent that was reached."""
    scores = jax.jit(lambda z: sde.score(field, z, LEVELS, NOISE))(path.latents)
    assert path.latents.shape == (*BATCH, 11, *LATENT) and path.latents.dtype == np.float32
    assert scores.means.shape == (*BATCH, 10, *LATENT)
    assert path.log_probs.shape == scores.log_probs.shape == (*BATCH, 10) and scores.stds.shape == (10,)
    np.testing.assert_array_equal(path.latents[:, :, 0], INITIAL)
    levels, latents = LEVELS.astype(np.float64), path.latents.astype(np.float64)
    for i, (s, following) in enumerate(itertools.pairwise(levels)):
        x, after = latents[:, :, i], latents[:, :, i + 1]
        mean, std = reference_step(x, field(x, s, np), s, following, levels[1], 0.7)
        drawn = [[jax.random.normal(jax.random.fold_in(key, i), LATENT) for key in row] for row in KEYS]
        np.testing.assert_allclose(scores.means[:, :, i], mean, rtol=0, atol=1e-5)
        np.testing.assert_allclose(scores.stds[i], std, rtol=1e-6)
        np.testing.assert_allclose(after, mean + std * np.array(drawn), rtol=0, atol=1e-5)
        expected = reference_log_prob(after, np.asarray(scores.means[:, :, i], np.float64), std)
        np.testing.assert_allclose(scores.log_probs[:, :, i], expected, rtol=0, atol=1e-4)
    assert np.ptp(path.log_probs, axis=-1).min() > 0.1


def test_scorer_agrees_with_sampler(path):
    """The ratio of an update without a change is one."""
    scores = jax.jit(lambda z: sde.score(field, z, LEVELS, NOISE))(path.latents)
    np.testing.assert_allclose(scores.log_probs, path.log_probs, rtol=0, atol=1e-4)


def test_no_noise_is_the_ode():
    path = jax.jit(lambda z: sde.sample(field, z, LEVELS, np.zeros(10), KEYS))(INITIAL)
    assert path.log_probs.shape == (*BATCH, 0)
    expected = jax.jit(lambda z: flow.euler(field, z, LEVELS))(INITIAL)
    np.testing.assert_allclose(path.latents[:, :, -1], expected, rtol=0, atol=1e-6)


def test_a_window_of_noise():
    """Steps without noise follow the ODE and are no actions."""
    noise = np.zeros(10)
    noise[[2, 3]] = 0.7
    path = jax.jit(lambda z: sde.sample(field, z, LEVELS, noise, KEYS))(INITIAL)
    scores = jax.jit(lambda z: sde.score(field, z, LEVELS, noise))(path.latents)
    assert path.log_probs.shape == (*BATCH, 2) and scores.means.shape == (*BATCH, 2, *LATENT)
    np.testing.assert_allclose(scores.log_probs, path.log_probs, rtol=0, atol=1e-4)
    x = np.asarray(path.latents, np.float64)
    for i in range(10):
        ode = x[:, :, i] + field(x[:, :, i], LEVELS[i], np) * (LEVELS[i + 1] - LEVELS[i])
        gap = np.abs(x[:, :, i + 1] - ode).max()
        assert gap > 0.1 if i in (2, 3) else gap < 1e-5
    for k, i in enumerate((2, 3)):
        mean, std = reference_step(x[:, :, i], field(x[:, :, i], LEVELS[i], np), *map(float, LEVELS[i : i + 2]), 0, 0.7)
        expected = reference_log_prob(x[:, :, i + 1], mean, std)
        np.testing.assert_allclose(path.log_probs[:, :, k], expected, rtol=0, atol=1e-4)


def test_gradient_of_the_scores(path):
    """d log p / d theta of v = theta sin(3 x) + ...: (x' - mean) b sin(3 x) / std^2, averaged."""
    scale, latents = 1.3, path.latents

    def total(scale):
        return sde.score(lambda x, s: field(x, s, scale=scale), latents, LEVELS, NOISE).log_probs.sum()

    found = jax.jit(jax.grad(total))(scale)
    expected = 0.0
    x = latents.astype(np.float64)
    for i in range(10):
        a, b, std = sde.gaussians(LEVELS, NOISE)[i]
        before, after = x[:, :, i], x[:, :, i + 1]
        mean = a * before + b * field(before, LEVELS[i], np, scale)
        expected += ((after - mean) * b * np.sin(3 * before) / std**2).mean(axis=(-3, -2, -1)).sum()
    assert abs(expected) > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_sample_does_not_depend_on_its_neighbours(path):
    alone = sampled(INITIAL[1:, 2:], KEYS[1:, 2:])
    np.testing.assert_allclose(alone.latents, path.latents[1:, 2:], rtol=0, atol=1e-6)
    other = sampled(INITIAL, jax.random.split(jax.random.key(8), BATCH))
    assert np.abs(other.latents[:, :, 1] - path.latents[:, :, 1]).min(axis=(-3, -2, -1)).max() > 1e-6


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_samples_have_the_distribution_of_the_data(noise):
    """With the exact velocity of Gaussian data N(2, 0.5^2), the SDE ends where the ODE does: at the data."""

    def velocity(x, s):
        centred = x - (1 - s) * 2.0
        variance = (1 - s) ** 2 * 0.25 + s**2
        return s / variance * centred - (2.0 + (1 - s) * 0.25 / variance * centred)

    keys = jax.random.split(jax.random.key(0), 8)
    initial = jax.random.normal(jax.random.key(1), (8, 32, 32, 1))
    levels = flow.sigmas(100, 1.0, "uniform")
    path = jax.jit(lambda z: sde.sample(velocity, z, levels, np.full(100, noise), keys))(initial)
    final = np.asarray(path.latents[:, -1])
    np.testing.assert_allclose(final.mean(), 2.0, atol=0.02)
    np.testing.assert_allclose(final.std(), 0.5, atol=0.02)


def test_a_decoder_as_a_policy():
    """A tiny SD3: a group's paths scored as they were sampled, and the gradient that an update would follow."""
    config = Config(
        sample_size=4,
        patch_size=2,
        in_channels=5,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=5,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    model = SD3Transformer(config)
    rng = np.random.default_rng(1)
    text, pooled = (rng.standard_normal((*BATCH, *shape)).astype(np.float32) for shape in ((7, 6), (6,)))
    params = initial(model, jax.random.key(0), INITIAL, text, pooled, np.zeros(BATCH))
    levels, noise = flow.sigmas(4, 3.0, "uniform"), np.array([0.7, 0.7, 0.7, 0])

    def velocity(params):
        return lambda x, s: model.apply({"params": params}, x, text, pooled, jnp.broadcast_to(s * 1000, BATCH))

    path = jax.jit(lambda p: sde.sample(velocity(p), INITIAL, levels, noise, KEYS))(params)

    def loss(params):
        ratio = jnp.exp(sde.score(velocity(params), path.latents, levels, noise).log_probs - path.log_probs)
        return -ratio.mean(), ratio

    (_, ratio), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert ratio.shape == (*BATCH, 3)
    np.testing.assert_allclose(ratio, 1, rtol=0, atol=1e-4)
    sizes = [float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)]
    assert np.isfinite(sizes).all() and max(sizes) > 1e-4


def test_noise_is_one_number_a_step():
    with pytest.raises(ValueError, match="each of 10 steps"):
        sde.gaussians(LEVELS, np.full(9, 0.7))
    with pytest.raises(ValueError, match="each of 10 steps"):
        sde.gaussians(LEVELS, np.full(10, -0.1))
