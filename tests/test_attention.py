"""The choice of a kernel, and the TPU's kernel interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding
from uae_jax.models import attention as attentions
from uae_jax.models.attention import attention, kernel, splash


@pytest.mark.parametrize(
    "platform, dtype, queries, keys, head_dim, shared, general, expected",
    [
        ("tpu", jnp.bfloat16, 4352, 4352, 64, False, False, "splash"),  # SD3.5 at 1024 pixels
        ("tpu", jnp.float32, 1024, 1024, 128, False, False, "splash"),
        ("tpu", jnp.bfloat16, 1, 4096, 128, False, False, "xla"),  # decode
        ("tpu", jnp.bfloat16, 64, 64, 80, False, False, "xla"),  # a window
        ("tpu", jnp.bfloat16, 1024, 1024, 128, False, True, "xla"),  # causal
        ("tpu", jnp.bfloat16, 1024, 1024, 128, True, False, "xla"),  # grouped heads
        ("tpu", jnp.bfloat16, 1024, 1024, 6, False, False, "xla"),
        ("tpu", jnp.bfloat16, 4096, 4096, 512, False, False, "xla"),  # the VAE's single head
        ("gpu", jnp.bfloat16, 4352, 4352, 64, False, False, "cudnn"),
        ("gpu", jnp.float32, 4352, 4352, 64, False, False, "xla"),
        ("gpu", jnp.bfloat16, 1024, 1024, 256, False, False, "xla"),
        ("gpu", jnp.bfloat16, 1, 1024, 64, False, False, "xla"),
        ("cpu", jnp.bfloat16, 4352, 4352, 64, False, False, "xla"),
    ],
)
def test_choice(platform, dtype, queries, keys, head_dim, shared, general, expected):
    assert kernel(platform, dtype, queries, keys, head_dim, shared_keys=shared, general=general) == expected


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_splash_is_attention():
    """Lengths that are no whole blocks, a head of half a register, hidden keys; outputs and gradients."""
    q, k, v = draw(2, 150, 2, 24), draw(2, 200, 2, 24, seed=1), draw(2, 200, 2, 24, seed=2)
    seen = jnp.arange(200) < jnp.array([[200], [130]])
    weights = draw(2, 150, 2, 24, seed=3)

    def ours(q, k, v):
        return (splash(q, k, v, seen, scale=0.3, interpret=True) * weights).sum()

    def plain(q, k, v):
        return (attention(q, k, v, seen[:, None], scale=0.3) * weights).sum()

    found = jax.jit(splash, static_argnames=("scale", "interpret"))(q, k, v, seen, scale=0.3, interpret=True)
    np.testing.assert_allclose(found, attention(q, k, v, seen[:, None], scale=0.3), rtol=0, atol=1e-5)
    assert not np.allclose(found[1], attention(q, k, v, scale=0.3)[1], atol=1e-3), "the mask must matter"
    for a, b in zip(*(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_the_platform_is_the_mesh_in_context(monkeypatch):
    assert sharding.platform() == "cpu"
    mesh = jax.make_mesh((1, 1, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    assert sharding.under(mesh, sharding.platform)() == "cpu" and sharding.under(None, len) is len
    q = draw(2, 1, 300, 2, 16)
    expected = attention(q, q, q)
    calls = []

    def spy(q, k, v, seen, *, scale):
        calls.append((q.shape, seen.shape, bool(mesh)))
        return splash(q, k, v, seen, scale=scale, interpret=True)

    monkeypatch.setattr(attentions, "splash", spy)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    found = jax.jit(sharding.under(mesh, lambda q: attention(q, q, q)))(q)
    assert calls == [((2, 1, 300, 2, 16), (2, 1, 300), True)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
