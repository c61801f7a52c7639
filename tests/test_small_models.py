"""The projector and the attribute judge."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.convert.table import flat_names, load, save
from uae_jax.errors import UserError
from uae_jax.models import apply, initial
from uae_jax.models.cell_classifier import model as judge
from uae_jax.models.projector import model as projector


def draw_tensors(table, seed=0):
    """Random tensors of a checkpoint, biases included."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=e.shape).astype(np.float32) * 0.3 for e in table for n in flat_names(e.names)}


def same_structure(params, fresh):
    return jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, fresh)


# ---- projector -------------------------------------------------------------------------------------------------------

PROJECTOR = projector.Config(5, 7, 3, whiten=True)


@pytest.mark.parametrize("whiten", [False, True])
def test_projector_matches_numpy(whiten):
    """Linear, exact GELU, Linear, in torch's layout and UAE's names."""
    config = projector.Config(5, 7, 3, whiten=whiten)
    tensors = draw_tensors(projector.table(config))
    params = load(projector.table(config), tensors)
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    module = projector.Projector(config)
    assert same_structure(params, jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    h = (x.astype(float) - tensors["whitening.mean"]) @ tensors["whitening.matrix"] if whiten else x
    h = h @ tensors["0.weight"].T + tensors["0.bias"]
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    expected = h @ tensors["2.weight"].T + tensors["2.bias"]
    np.testing.assert_allclose(apply(module, params, x), expected, atol=1e-5)
    back = save(projector.table(config), params)
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors | back)


def test_the_published_projector():
    """UAE: 2048 -> 8192 -> 4096."""
    found = {e.names: e.shape for e in projector.table(projector.Config(2048, 8192, 4096))}
    assert found == {"0.weight": (8192, 2048), "0.bias": (8192,), "2.weight": (4096, 8192), "2.bias": (4096,)}


def test_whitening_is_fixed_and_starts_as_the_identity():
    module = projector.Projector(PROJECTOR)
    x = jax.random.normal(jax.random.key(1), (4, 5))
    params = initial(module, jax.random.key(0), x)
    plain = projector.Projector(projector.Config(5, 7, 3))
    linear = {name: params[name] for name in ("linear_1", "linear_2")}
    np.testing.assert_allclose(apply(module, params, x), apply(plain, linear, x), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: (apply(module, p, x) ** 2).sum()))(params)
    assert not gradient["mean"].any() and not gradient["matrix"].any()
    assert gradient["linear_1"]["kernel"].any() and gradient["linear_2"]["bias"].any()


def test_whitening_is_float32_in_a_bfloat16_model():
    """Directions of tiny variance beside large ones are what it is for."""
    module = projector.Projector(PROJECTOR, dtype=jnp.bfloat16)
    x = np.ones((2, 5), np.float32)
    params = initial(module, jax.random.key(0), x)
    with jax.default_matmul_precision("bfloat16"):
        jaxpr = str(jax.make_jaxpr(lambda p: apply(module, p, x))(params))
    whitening = [line for line in jaxpr.splitlines() if ":f32[2,5] = dot_general" in line]
    assert len(whitening) == 1 and ":bf16[2,3] = dot_general" in jaxpr
    after = jaxpr[jaxpr.index(whitening[0]) :]
    assert "HIGHEST" in after[: after.index(":bf16")]


def test_projector_config():
    assert projector.Config.from_hf(PROJECTOR.to_hf()) == PROJECTOR
    with pytest.raises(UserError, match="hidden_size"):
        projector.Config.from_hf({"in_size": 5, "out_size": 3, "whiten": False})


# ---- judge -----------------------------------------------------------------------------------------------------------

JUDGE = judge.Config(channels=4)


@pytest.fixture(scope="module")
def tiny():
    params = load(judge.table(JUDGE), draw_tensors(judge.table(JUDGE)))
    return jax.jit(lambda x: apply(judge.CellClassifier(JUDGE), params, x)), params


def test_judge_shapes_and_table(tiny):
    classify, params = tiny
    images = np.random.default_rng(0).random((2, 3, 48, 48, 3), np.float32)
    fresh = jax.eval_shape(judge.CellClassifier(JUDGE).init, jax.random.key(0), images)["params"]
    assert same_structure(params, fresh)
    found = classify(images)
    shapes = {name: x.shape for name, x in found.items()}
    assert shapes == {"shape": (2, 3, 9, 7), "colour": (2, 3, 9, 9), "size": (2, 3, 9, 3), "background": (2, 3, 4)}
    alone = classify(images[1, 2])
    assert all(np.allclose(found[name][1, 2], alone[name], atol=1e-5) for name in found)
    back = save(judge.table(JUDGE), params)
    assert same_structure(load(judge.table(JUDGE), back), fresh)


def test_cells_are_in_raster_order(tiny):
    """A mark in the middle of a cell shows in that cell, and not in those two away."""
    classify, _ = tiny
    blank = np.full((48, 48, 3), 0.5, np.float32)
    marked = np.repeat(blank[None], 9, axis=0)
    for cell in range(9):
        row, column = divmod(cell, 3)
        marked[cell, 16 * row + 6 : 16 * row + 10, 16 * column + 6 : 16 * column + 10] = 1.0
    before, after = classify(blank), classify(marked)
    for name in ("shape", "colour", "size"):
        change = np.abs(np.asarray(after[name]) - np.asarray(before[name])).max(-1)
        assert np.array_equal(change.argmax(-1), np.arange(9)), name
        for cell in range(9):
            row, column = divmod(cell, 3)
            far = [o for o in range(9) if max(abs(o // 3 - row), abs(o % 3 - column)) == 2]
            assert (change[cell, far] < 1e-5).all()
    assert (np.abs(after["background"] - before["background"]).max(-1) > 1e-4).all()


def test_judge_matches_a_plain_convolution():
    """The whole network in NumPy, from the tensors as they are stored."""
    config = judge.Config(grid=2, channels=4, shapes=3, colours=4, sizes=2, backgrounds=2)
    tensors = draw_tensors(judge.table(config, image_size=16))
    params = load(judge.table(config, image_size=16), tensors)
    image = np.random.default_rng(2).random((16, 16, 3))

    def gelu(x):  # flax's default is the tanh form
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = image * 2 - 1
    for i, stride in enumerate((2, 2, 1)):
        size = len(x) // stride
        before = (3 - stride) // 2  # "SAME": one row of padding in all, at the end, for stride 2
        padded = np.pad(x, [(before, 1), (before, 1), (0, 0)])
        w = tensors[f"conv_{i}.weight"]
        windows = [
            [padded[stride * r : stride * r + 3, stride * c : stride * c + 3] for c in range(size)] for r in range(size)
        ]
        x = gelu(np.einsum("rcijk,okij->rco", np.array(windows), w) + tensors[f"conv_{i}.bias"])
    cells = np.array([x[2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1) for r in range(2) for c in range(2)])
    cells = gelu(cells @ tensors["cell.weight"].T + tensors["cell.bias"])
    logits = cells @ tensors["attributes.weight"].T + tensors["attributes.bias"]
    expected = {"shape": logits[:, :3], "colour": logits[:, 3:7], "size": logits[:, 7:]}
    expected["background"] = cells.mean(0) @ tensors["background.weight"].T + tensors["background.bias"]
    found = jax.jit(lambda x: apply(judge.CellClassifier(config), params, x))(image.astype(np.float32))
    assert found.keys() == expected.keys() == {*config.outputs, "background"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def test_judge_config():
    assert judge.Config.from_hf(JUDGE.to_hf()) == JUDGE
    with pytest.raises(UserError, match="colours"):
        judge.Config.from_hf({k: v for k, v in JUDGE.to_hf().items() if k != "colours"})
