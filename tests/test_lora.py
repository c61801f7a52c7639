"""Low-rank adapters: what they change, what is trained, and that one copy of the weights serves all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import tiny
from uae_jax import lora, optimizers, sharding, step, system
from uae_jax.errors import UserError
from uae_jax.models.dense import Dense
from uae_jax.stages import rl
from uae_jax.step import STARTING_WEIGHTS
from uae_jax.umm import Family

RANK, ALPHA = 3, 6.0
EVERYTHING = "language/layers/.*|visual/.*"


def config_of(weights, **changes):
    return tiny.config(weights, lora__rank=RANK, lora__alpha=ALPHA, lora__target=EVERYTHING, **changes)


@pytest.fixture(scope="module")
def built(weights):
    config = config_of(weights)
    return system.load(config, sharding.make_mesh(config))


@pytest.fixture(scope="module")
def family(weights, built):
    """Its functions, compiled once for all tests: with adapters, and without."""
    return Family(*map(jax.jit, built.family(config_of(weights, rl__max_tokens=12))))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def images(n):
    return jnp.asarray(tiny.scenes(n), jnp.float32) / 255.0


def keys(b, g):
    return step.sample_keys(jax.random.key(0), jnp.int32(0), b, g)


def moved(adapters, seed=0):
    """Adapters as after some training: no factor is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), adapters)


def merged(start, adapters):
    """Full weights by the definition: kernel + (alpha / r) a @ b."""
    weights, added = dict(flat(start)), flat(adapters)
    for path in added:
        if path.endswith("lora_a"):
            parent = path.removesuffix("lora_a")
            weights[f"{parent}kernel"] += ALPHA / RANK * added[path] @ added[f"{parent}lora_b"]
    return traverse_util.unflatten_dict(weights, sep="/")


@pytest.mark.parametrize("dtype,bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)])
def test_layer(dtype, bound):
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5, 8), (8, 6), (8, 2), (2, 6)))
    layer, bias = Dense(6, dtype=dtype), rng.standard_normal(6).astype(np.float32)
    found = layer.apply({"params": {"kernel": w, "bias": bias, "lora_a": a, "lora_b": b}}, x)
    assert found.dtype == dtype
    expected = x @ (w + a @ b) + bias
    assert np.abs(np.asarray(found, np.float32) - expected).max() < bound * np.abs(expected).max()
    assert set(layer.init(jax.random.key(0), x)["params"]) == {"kernel", "bias"}


def test_adapters_lie_beside_the_kernels(weights, built):
    start = built.frozen["start"]
    adapters = flat(system.trained(start, config_of(weights)))
    kernels = {path: x.shape for path, x in flat(start).items() if path.endswith("kernel")}
    parents = {path.rsplit("/", 1)[0] for path in adapters}
    assert parents == {path.rsplit("/", 1)[0] for path in kernels} - {"language/lm_head"}
    *layers, inputs, outputs = kernels["language/layers/self_attn/q_proj/kernel"]
    assert adapters["language/layers/self_attn/q_proj/lora_a"].shape == (*layers, inputs, RANK)
    assert adapters["language/layers/self_attn/q_proj/lora_b"].shape == (*layers, RANK, outputs)
    assert adapters["visual/blocks/windowed/attn/qkv/lora_a"].ndim == 4  # period, block, in, r
    for path, x in adapters.items():
        assert np.any(x) == path.endswith("lora_a") and x.dtype == jnp.float32
    drawn = next(x for path, x in adapters.items() if path.endswith("q_proj/lora_a"))
    assert np.abs(drawn).max() < inputs**-0.5 and not np.array_equal(drawn[0], drawn[1])
    some = system.trained(start, tiny.config(weights, lora__rank=2, lora__target=".*self_attn/[qv]_proj"))
    assert {path.split("/")[-2] for path in flat(some)} == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"lora.target = 'embed' matches no kernel"):
        lora.initial(start, RANK, "embed", jax.random.key(0))


def test_adapters_at_first_change_nothing(weights, built, family):
    """To the bit, captions and log-probs: the KL to the reference is 0."""
    fresh = {"encoder": system.trained(built.frozen["start"], config_of(weights))}
    captions, scores = [], []
    for params in (fresh, STARTING_WEIGHTS):
        captions.append(family.generate(params, built.frozen, images(3), keys(3, 4)))
        scores.append(family.log_probs(params, built.frozen, images(3), {"caption": captions[0]})["caption"])
    jax.tree.map(np.testing.assert_array_equal, *captions)
    np.testing.assert_array_equal(*scores)


def test_adapters_are_added_kernels_for_sampler_and_scorer(weights, built, family):
    """Trained adapters sample and score as a model with merged kernels does; the starting weights stay as they were."""
    adapters = moved(system.trained(built.frozen["start"], config_of(weights)))
    full = built.frozen | {"start": merged(built.frozen["start"], adapters)}

    generate, log_probs = family.generate, family.log_probs
    captions = generate({"encoder": adapters}, built.frozen, images(3), keys(3, 4))
    trajectory = {"caption": captions}
    scored = log_probs({"encoder": adapters}, built.frozen, images(3), trajectory)["caption"]
    expected = log_probs(STARTING_WEIGHTS, full, images(3), trajectory)["caption"]
    reference = log_probs(STARTING_WEIGHTS, built.frozen, images(3), trajectory)["caption"]
    assert captions.mask.sum() > 40
    assert np.abs(scored - captions.log_probs).max() < 1e-4
    assert np.abs(scored - expected).max() < 1e-4
    assert np.abs(reference - expected).max() > 0.1
    again = generate(STARTING_WEIGHTS, full, images(3), keys(3, 4))
    np.testing.assert_array_equal(captions.actions, again.actions)


def test_only_adapters_are_trained(weights, built):
    """A whole step: gradients, optimizer state and checkpoint hold adapters alone; KL and gap are 0 at the start."""
    config = config_of(weights, rl__beta=0.1, optimizer__learning_rate=1e-2, monitor=())
    state, function = make(config, built)
    paths = {path.rsplit("/", 1)[-1] for path in flat(state.params)}
    assert paths == {"lora_a", "lora_b"}
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * trained < sum(x.size for x in jax.tree.leaves(built.frozen["start"]))
    start = jax.tree.map(np.asarray, built.frozen["start"])
    compiled, lines = jax.jit(function), []
    first = state
    for _ in range(3):
        state, metrics = compiled(state, built.frozen, {"image": jnp.asarray(tiny.scenes(2))})
        lines.append({name: float(value) for name, value in metrics.items()})
    assert lines[0]["kl"] < 1e-10 < 1e-6 < lines[1]["kl"]  # to the bit where one program computes both: see above
    for line in lines:
        assert line["logp/sampler_gap"] < 1e-4 and line["update_norm/encoder"] > 0 and line["bad_steps"] == 0
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, first.params)
    assert all(jax.tree.leaves(changed))  # the tower's too
    jax.tree.map(np.testing.assert_array_equal, start, jax.tree.map(np.asarray, built.frozen["start"]))


def make(config, built):
    """State and step function of a config."""
    state, optimizer = rl.start(config, built)
    function = step.make_step(
        config, built.family(config), built.towers, optimizer,
        end_token=built.prompts.end_token, automaton=built.automaton,
    )  # fmt: skip
    return state, function


def test_the_text_encoder_is_the_base(weights, built, family):
    """Frozen it ignores adapters; live it has them."""
    config = config_of(weights)
    adapters = {"encoder": moved(system.trained(built.frozen["start"], config))}
    captions = family.generate(STARTING_WEIGHTS, built.frozen, images(3), keys(3, 4))
    for encoder, differs in (("frozen", False), ("live", True)):
        redraw = jax.jit(built.family(config_of(weights, text_encoder=encoder)).redraw)
        with_adapters, without = (
            np.asarray(redraw(p, built.frozen, captions, images(3), keys(3, 4))[0])
            for p in (adapters, STARTING_WEIGHTS)
        )
        assert (with_adapters != without).any() == differs


def test_muon_takes_adapters_for_matrices(weights, built):
    adapters = system.trained(built.frozen["start"], config_of(weights))
    assert all(x is not None for x in flat(optimizers.matrices(adapters)).values())
