"""Name tables: strict both ways, and a round trip is the identity."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uae_jax.convert.table import (
    CONV2D,
    KEEP,
    LINEAR,
    PATCHES,
    Entry,
    flat_names,
    layers,
    load,
    param_shape,
    read,
    save,
)
from uae_jax.errors import UserError

patient = settings(deadline=None, max_examples=100)


def number(*shape):
    """An array whose values tell where they stand, in torch's layout."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


# ---- transforms ------------------------------------------------------------------------------------------------------


def test_transforms_by_index():
    w = number(5, 3)
    assert LINEAR.to_jax(w)[2, 4] == w[4, 2]
    w = number(5, 3, 2, 4)
    assert CONV2D.to_jax(w)[1, 3, 2, 4] == w[4, 2, 1, 3]
    assert PATCHES.to_jax(w).shape == (3 * 2 * 4, 5)
    assert PATCHES.to_jax(w)[(2 * 2 + 1) * 4 + 3, 4] == w[4, 2, 1, 3]


def test_patches_equal_a_strided_convolution():
    """Each patch flattened as channels, rows, columns."""
    rng = np.random.default_rng(0)
    w, image = rng.normal(size=(5, 3, 2, 4)), rng.normal(size=(3, 6, 8))
    patches = image.reshape(3, 3, 2, 2, 4).transpose(1, 3, 0, 2, 4).reshape(3, 2, -1)
    expected = np.einsum("cyhxw,ochw->yxo", image.reshape(3, 3, 2, 2, 4), w)
    np.testing.assert_allclose(patches @ PATCHES.to_jax(w), expected, atol=1e-12)


# ---- round trip ------------------------------------------------------------------------------------------------------

sides = st.integers(1, 4)
KINDS = {
    "keep": (KEEP, hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)),
    "linear": (LINEAR, st.tuples(sides, sides)),
    "conv": (CONV2D, st.tuples(sides, sides, sides, sides)),
    "patches": (PATCHES, st.tuples(sides, sides, sides, sides)),
    "video": (PATCHES, st.tuples(sides, sides, sides, sides, sides)),
}


@st.composite
def tables(draw):
    """Entries of every transform, single, stacked and stacked twice, at nested paths."""
    table = []
    for i, kind in enumerate(draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5))):
        transform, shapes = KINDS[kind]
        outer, inner = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
        names = f"{kind}.{i}"
        if inner:
            names = layers(f"{kind}.{i}.x.{{}}", range(inner))
            if outer:
                names = tuple(layers(f"{kind}.{i}.{o}.{{}}", range(inner)) for o in range(outer))
        table.append(Entry(f"part_{i % 2}/{kind}_{i}/kernel", names, draw(shapes), transform))
    return table


@patient
@given(tables(), st.integers(0, 2**31), st.sampled_from([np.float32, np.float16]))
def test_round_trip(table, seed, dtype):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=entry.shape).astype(dtype) for entry in table for name in flat_names(entry.names)}
    params = load(table, tensors)
    for entry in table:
        node = params
        for part in entry.path.split("/"):
            node = node[part]
        assert node.shape == param_shape(entry) and node.dtype == dtype
        if not isinstance(entry.names, str):
            first = entry.names[-1] if isinstance(entry.names[-1], str) else entry.names[-1][-1]
            last = node[-1] if isinstance(entry.names[-1], str) else node[-1, -1]
            assert np.array_equal(last, entry.transform.to_jax(tensors[first]))
    back = save(table, params)
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].shape == x.shape and back[name].dtype == dtype and np.array_equal(back[name], x)
        assert back[name].flags.c_contiguous


@patient
@given(tables(), st.integers(0, 2**31), st.data())
def test_slices_are_those_of_the_whole(table, seed, data):
    """Along every axis, stacking ones included, as a device would ask for its part."""
    rng = np.random.default_rng(seed)
    tensors = {name: rng.normal(size=entry.shape) for entry in table for name in flat_names(entry.names)}
    for entry in table:
        whole = read(entry, tensors, (slice(None),) * len(param_shape(entry)), np.float32)
        ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.shape]
        index = tuple(slice(*pair) for pair in ends)
        part = read(entry, tensors, index, np.float32)
        assert part.dtype == np.float32 and part.shape == whole[index].shape and np.array_equal(part, whole[index])


def test_order_of_stacking():
    table = [Entry("w", (("a", "b"), ("c", "d"), ("e", "f")), (2,))]
    tensors = {name: np.full(2, i) for i, name in enumerate("abcdef")}
    assert load(table, tensors)["w"][..., 0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert layers("h.{}.w", range(2)) == ("h.0.w", "h.1.w")
    assert flat_names(table[0].names) == list("abcdef")


def test_saved_tensors_are_no_views():
    params = {"w": number(3, 4)}
    saved = save([Entry("w", "w", (4, 3), LINEAR)], params)
    params["w"][:] = 0
    assert saved["w"].any()


# ---- strictness ------------------------------------------------------------------------------------------------------

TABLE = [
    Entry("one/kernel", "one.weight", (2, 3), LINEAR),
    Entry("one/bias", "one.bias", (2,)),
    Entry("stack/kernel", layers("h.{}.weight", range(2)), (4, 5), LINEAR),
]
TENSORS = {"one.weight": number(2, 3), "one.bias": number(2), "h.0.weight": number(4, 5), "h.1.weight": number(4, 5)}


def test_load_lists_all_problems_at_once():
    table = [*TABLE, Entry("one/bias", "again", (1,)), Entry("two", "one.bias", (2,))]
    tensors = {
        "one.weight": number(3, 2),
        "one.bias": number(2),
        "h.1.weight": number(4, 5),
        "h.2.weight": number(7),
        "again": number(1),
    }
    with pytest.raises(UserError) as caught:
        load(table, tensors, "model.safetensors")
    message = str(caught.value)
    assert message.startswith("model.safetensors") and "\n" not in message
    for problem in (
        "shape of one.weight: expected (2, 3), found (3, 2)",
        "missing: h.0.weight (4, 5)",
        "unexpected: h.2.weight (7,)",
        "used twice: one.bias",
        "set twice: one/bias",
    ):
        assert problem in message
    assert message.count(";") == 4, "nothing else is wrong"


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"one.bias": None}, "missing: one.bias"),
        ({"extra": number(1)}, "unexpected: extra"),
        ({"one.bias": number(3)}, "shape of one.bias: expected (2,), found (3,)"),
        ({"one.bias": number(1, 2)}, "shape of one.bias"),
        ({"h.1.weight": number(5, 4)}, "shape of h.1.weight: expected (4, 5), found (5, 4)"),
    ],
)
def test_load_is_strict(change, problem):
    tensors = {name: x for name, x in (TENSORS | change).items() if x is not None}
    with pytest.raises(UserError) as caught:
        load(TABLE, tensors)
    assert problem in str(caught.value) and ";" not in str(caught.value)


def test_save_lists_all_problems_at_once():
    """A wrong shape would else be reshaped into a checkpoint that only looks right."""
    params = load(TABLE, TENSORS)
    params["one"]["kernel"] = params["one"]["kernel"].T
    params["stack"]["kernel"] = params["stack"]["kernel"][:1]
    params["more"] = params["one"].pop("bias")
    with pytest.raises(UserError) as caught:
        save(TABLE, params)
    message = str(caught.value)
    for problem in (
        "shape of one/kernel: expected (3, 2), found (2, 3)",
        "shape of stack/kernel: expected (2, 5, 4), found (1, 5, 4)",
        "missing: one/bias (2,)",
        "unexpected: more (2,)",
    ):
        assert problem in message
    assert message.count(";") == 3 and "\n" not in message


def test_lazy_mappings_are_read_once_each():
    """Tensors of a checkpoint may be large: shapes come first, and each is read when it is placed."""

    class Lazy(dict):
        def __getitem__(self, name):
            seen.append(name)
            return super().__getitem__(name)

    seen: list[str] = []
    assert np.array_equal(load(TABLE, Lazy(TENSORS))["one"]["bias"], TENSORS["one.bias"])
    assert set(seen) == set(TENSORS)
