"""Schedules, and what Muon and Adam each move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from uae_jax import optimizers
from uae_jax.config import optimizer as fields

RATE = 0.02


def make(name, params, steps=100, **changes):
    """An optimizer with its state, and its compiled update."""
    config = fields(name, RATE)
    with config.unlocked():
        config.update(changes)
    transformation = optimizers.make(config, optimizers.schedule(config, steps))
    return transformation.init(params), jax.jit(transformation.update)


# ---- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [False, True])
def test_schedule(decay):
    rate = optimizers.schedule(fields("adamw", RATE, warmup=10, decay=decay), 50)
    values = np.array([rate(i) for i in (0, 5, 10, 30, 50, 70)])
    after = [1, 0.5, 0, 0] if decay else [1, 1, 1, 1]  # cosine: half at the middle, 0 at the end and behind it
    np.testing.assert_allclose(values, RATE * np.array([0, 0.5, *after]), atol=1e-8)


@pytest.mark.parametrize("decay", [False, True])
def test_schedule_without_warmup_starts_at_the_rate(decay):
    assert np.isclose(optimizers.schedule(fields("adamw", RATE, decay=decay), 50)(0), RATE)


def test_schedule_shorter_than_its_warmup():
    rate = optimizers.schedule(fields("adamw", RATE, warmup=10, decay=True), 5)
    assert np.isclose(rate(4), 0.4 * RATE) and np.isfinite(rate(20))


# ---- muon ------------------------------------------------------------------------------------------------------------

SHAPES = {
    "attention": {"kernel": (16, 24), "bias": (24,)},
    "layers": {"mlp": {"kernel": (3, 24, 12), "bias": (3, 12)}, "norm": {"scale": (3, 24)}},
    "nested": {"kernel": (2, 3, 8, 16)},
    "conv_0": {"kernel": (3, 3, 4, 8)},
    "embed": {"embedding": (20, 16)},
    "scale": (),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.fixture(scope="module")
def first_update():
    """The first update by Muon, for gradients of very different sizes."""
    params = draw(0)
    state, update = make("muon", params, max_grad_norm=1e9)
    gradient = draw(1)
    gradient["layers"]["mlp"]["kernel"] *= np.array([1e-2, 1, 1e2], np.float32)[:, None, None]
    return jax.tree.map(np.asarray, update(gradient, state, params)[0]), gradient, params, state


@pytest.mark.parametrize("path", [("attention",), ("layers", "mlp"), ("nested",)])
def test_muon_orthogonalises_every_kernel_of_a_stack(first_update, path):
    updates, gradient, *_ = first_update
    for name in path:
        updates, gradient = updates[name], gradient[name]
    updates, gradient = updates["kernel"], gradient["kernel"]
    inputs, outputs = updates.shape[-2:]
    # Muon's scale for wide layers; five Newton-Schulz steps bring singular values near 1, not to it.
    values = np.linalg.svd(updates, compute_uv=False) / (RATE * np.sqrt(max(1, outputs / inputs)))
    assert values.shape[:-1] == updates.shape[:-2]
    assert values.min() > 0.6 and values.max() < 1.3
    u, s, v = np.linalg.svd(gradient, full_matrices=False)
    assert (s.max(-1) / s.min(-1)).min() > 1.7, "the gradient itself is not orthogonal"
    directions = np.einsum("...io,...io->...", updates, u @ v) / np.linalg.norm(updates, axis=(-2, -1))
    assert (directions / np.sqrt(min(inputs, outputs)) < -0.97).all()  # downhill


def test_muon_leaves_the_rest_to_adam_at_a_tenth(first_update):
    updates, gradient, *_ = first_update
    for path in (("attention", "bias"), ("layers", "mlp", "bias"), ("layers", "norm", "scale"), ("conv_0", "kernel"),
                 ("embed", "embedding"), ("scale",)):  # fmt: skip
        u, g = updates, gradient
        for name in path:
            u, g = u[name], g[name]
        # Adam's first step is the sign of the gradient, here with Nesterov's bias-corrected momentum on top.
        steps = u / (-0.1 * RATE * np.sign(g))
        assert np.isclose(steps, steps.mean(), rtol=1e-3).all() and 0.9 < steps.mean() < 2.1, path


def test_matrices():
    chosen = optimizers.matrices(draw(0))
    assert chosen["attention"] == {"kernel": (0, 1), "bias": None}
    assert chosen["layers"] == {"mlp": {"kernel": (1, 2), "bias": None}, "norm": {"scale": None}}
    assert chosen["nested"] == {"kernel": (2, 3)}
    assert chosen["conv_0"] == {"kernel": None} and chosen["embed"] == {"embedding": None} and chosen["scale"] is None


def test_muon_keeps_no_second_moment_of_matrices(first_update):
    """Its state is one momentum a kernel: what a memory plan counts on."""
    *_, state = first_update
    sizes = [x.shape for x in jax.tree.leaves(state)]
    assert sizes.count((16, 24)) == 1 and sizes.count((3, 24, 12)) == 1 and sizes.count((20, 16)) == 2


# ---- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_go_downhill_and_warm_up_from_zero(name):
    target = {"kernel": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32), "bias": np.ones(6, np.float32)}
    params = jax.tree.map(jnp.zeros_like, target)
    state, update = make(name, params, warmup=2)

    def loss(params):
        return sum(((params[k] - target[k]) ** 2).sum() for k in target)

    gradient, value = jax.jit(jax.grad(loss)), jax.jit(loss)
    before = value(params)
    for i in range(60):
        changes, state = update(gradient(params), state, params)
        assert (optax.global_norm(changes) == 0) == (i == 0)
        params = optax.apply_updates(params, changes)
    assert value(params) < 0.7 * before


def test_gradients_are_clipped_by_their_global_norm():
    """Adam forgets the scale of a gradient, its state does not."""
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    gradient = {"a": jnp.array([3.0, 0, 0]), "b": jnp.array([[0.0, 4], [0, 0]])}
    for limit, factor in ((1.0, 0.2), (10.0, 1.0)):
        state, update = make("adamw", params, max_grad_norm=limit)
        _, state = update(gradient, state, params)
        momentum = next(x for x in jax.tree.leaves(state) if x.shape == (3,))
        np.testing.assert_allclose(momentum, np.array([3.0, 0, 0]) * factor * (1 - 0.9), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_decoupled(name):
    params = {"kernel": jnp.full((4, 4), 2.0)}
    state, update = make(name, params, weight_decay=0.5)
    changes, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
    np.testing.assert_allclose(changes["kernel"], -RATE * 0.5 * 2.0, rtol=1e-5)
