"""Policies of rematerialisation: the same gradients, with more or less work done twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.models import REMAT
from uae_jax.models.qwen2_5_vl.config import TextConfig
from uae_jax.models.qwen2_5_vl.language import LanguageModel, text_positions

CONFIG = TextConfig(11, 16, 24, 2, 2, 1, 1e4, (1, 1, 2), True)


def loss(remat, params, embeds):
    model = LanguageModel(CONFIG, remat=remat)
    positions, mask = text_positions(jnp.arange(3)), jnp.tril(jnp.ones((3, 3), bool))
    return (model.apply({"params": params}, embeds, positions, mask)[0] ** 3).mean()


@pytest.fixture(scope="module")
def case():
    embeds = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    arguments = (embeds, text_positions(jnp.arange(3)), jnp.ones((3, 3), bool))
    return jax.jit(LanguageModel(CONFIG).init)(jax.random.key(0), *arguments)["params"], embeds


def gradient(remat):
    return jax.grad(functools.partial(loss, remat))


def test_policies_differ_in_what_is_computed_twice(case):
    """Seven products with weights a layer; `full` does all but the last of them again, `dots` none."""
    count = {name: str(jax.make_jaxpr(gradient(name))(*case)).count("dot_general[") for name in REMAT}
    assert count["none"] < count["dots"] < count["full"]
    assert count["full"] - count["dots"] >= 6


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_gradients_do_not_depend_on_the_policy(case, remat):
    expected, found = jax.jit(gradient("none"))(*case), jax.jit(gradient(remat))(*case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)
