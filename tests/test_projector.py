"""Published projectors by name, and both activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import apply
from uae_jax.models.projector.model import KINDS, Config, Projector


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_two_layers_round_an_activation(activation, tmp_path):
    rng = np.random.default_rng(0)
    config = Config(3, 5, 2, activation=activation)
    params = {
        name: {"kernel": rng.standard_normal(shape), "bias": rng.standard_normal(shape[1])}
        for name, shape in (("linear_1", (3, 5)), ("linear_2", (5, 2)))
    }
    folder.save_model(tmp_path, config, params)
    again = folder.load_model(tmp_path)
    assert again.config == config
    x = rng.standard_normal((4, 3)).astype(np.float32)
    hidden = x @ params["linear_1"]["kernel"] + params["linear_1"]["bias"]
    hidden = hidden / (1 + np.exp(-hidden)) if activation == "silu" else np.asarray(jax.nn.gelu(hidden, False))
    expected = hidden @ params["linear_2"]["kernel"] + params["linear_2"]["bias"]
    np.testing.assert_allclose(apply(Projector(config), again.params, jnp.asarray(x)), expected, rtol=0, atol=1e-5)


def test_kinds_have_the_published_sizes():
    assert Config.from_hf({"architectures": ["Projector"], "kind": "uae"}) == Config(2048, 8192, 4096, False, "gelu")
    found = Config.from_hf({"kind": "uniworld", "in_size": 2048})
    assert found == Config(2048, 12288, 4096, False, "silu") and KINDS["uniworld"].in_size == 3584


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "metaquery"}, "not one of uae, uniworld"),
        ({"kind": "uniworld", "siglip_projector": {}}, "unknown fields"),
        ({"in_size": 1}, "missing fields"),
        ({"kind": "uae", "activation": "relu"}, "not one of gelu, silu"),
    ],
)
def test_what_no_projector_is(values, said):
    with pytest.raises(UserError, match=said) as caught:
        Config.from_hf(values)
    assert "\n" not in str(caught.value)
