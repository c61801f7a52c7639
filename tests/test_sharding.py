"""The mesh, where things live on it, and the decode view, on 8 virtual devices in a process of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import devices
from uae_jax import config as base
from uae_jax import sharding
from uae_jax.errors import UserError
from uae_jax.sampling import tokens
from uae_jax.sharding import Split

# ---- specs -----------------------------------------------------------------------------------------------------------


RULES = ((".*", Split.GATHERED),)


@pytest.mark.parametrize(
    "shape, fsdp, expected",
    [
        ((512, 1024), 1, P()),  # nothing to split over
        ((), 8, P()),
        ((100,), 8, P()),
        ((255, 256), 8, P()),  # one row short of what is worth splitting
        ((256, 256), 8, P("fsdp", None)),
        ((65536,), 8, P("fsdp")),
        ((512, 1024), 8, P(None, "fsdp")),  # the largest
        ((1024, 512), 8, P("fsdp", None)),
        ((512, 1021), 8, P("fsdp", None)),  # the largest that divides
        ((509, 1021), 8, P()),  # none divides
        ((4096, 64, 64), 8, P(None, "fsdp", None)),  # stacked layers are scanned over: the last choice
        ((16, 67, 97), 8, P("fsdp", None, None)),  # but better than nothing
        ((28, 256, 1024), 8, P(None, None, "fsdp")),
    ],
)
def test_param_spec(shape, fsdp, expected):
    sizes = {"slice": 1, "data": 1, "fsdp": fsdp, "tensor": 1}
    assert sharding.param_spec("kernel", shape, sizes, RULES) == expected
    # Where no rule splits by tensor, what is stored is.
    sizes["fsdp"], sizes["tensor"] = 1, fsdp
    other = P(*["tensor" if part else None for part in expected])
    assert sharding.param_spec("kernel", shape, sizes, RULES) == other


# ---- on 8 devices ----------------------------------------------------------------------------------------------------


def mesh_or_error(data, fsdp, tensor=1, *, batch=8, microbatches=1, evaluation=64, devices=None, slices=1, other=None):
    config = base.default()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.slice = data, fsdp, tensor, slices
    if other:
        config.unlock()
        config.mesh = other
    config.rl.group_size = 3  # nothing divides it
    config.data.batch_size, config.rl.microbatches, config.eval.batch_size = batch, microbatches, evaluation
    try:
        return list(sharding.make_mesh(config, devices).shape.values())
    except UserError as error:
        return str(error)


def rollout(weights, hidden, keys, mesh):
    """Scanned layers in a token loop."""

    def layer(x, w):
        return jnp.tanh(sharding.constrain_batch(x, mesh) @ w), None

    def decode(token, i, cache):
        cache = jax.lax.scan(layer, cache + token[:, None] * 0.1, weights)[0]
        return cache[:, :16], cache

    return tokens.sample(
        hidden[:, :16],
        hidden,
        decode,
        keys,
        allowed=jnp.ones(16, bool),
        sampling=tokens.Sampling(max_tokens=9, stops=(1,)),
    ).actions


def gathers(text):
    """Number of all-gathers inside and outside the loops of a compiled program."""
    bodies, name = {}, ""
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = match[1]
        bodies.setdefault(name, []).append(line)

    def reached(name):
        yield name
        for other in re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)", "\n".join(bodies[name])):
            yield from reached(other)

    loops = re.findall(r"(?:body|condition)=%?([\w.-]+)", text)
    inside = {n for loop in loops for n in reached(loop)}
    counts = {n: sum("all-gather(" in line or "all-gather-start(" in line for line in bodies[n]) for n in bodies}
    return sum(counts[n] for n in inside), sum(counts[n] for n in counts if n not in inside)


def on_eight_devices():
    """What the tests below look at; run by the fixture in a process with 8 virtual devices."""
    found = {"devices": jax.device_count()}
    found["meshes"] = {
        "default": mesh_or_error(-1, 1),
        "fsdp": mesh_or_error(1, -1),
        "both": mesh_or_error(-1, 4),
        "given": mesh_or_error(4, 2),
        "accumulated": mesh_or_error(2, 4, batch=16, microbatches=2),
        "devices": mesh_or_error(-1, 1, devices=jax.devices()[:2]),
        "tensor": mesh_or_error(-1, 2, 2),
        "slices": mesh_or_error(-1, 2, 2, slices=2),
        "some": mesh_or_error(1, 1, other={"fsdp": -1, "tensor": 4}),
        "unknown": mesh_or_error(1, 1, other={"fsdp": -1, "expert": 4}),
        "few": mesh_or_error(1, 4),
        "many": mesh_or_error(4, 4),
        "uneven": mesh_or_error(-1, 3),
        "two": mesh_or_error(-1, -1),
        "zero": mesh_or_error(0, -1),
        "negative": mesh_or_error(-2, -4),
        "batch": mesh_or_error(-1, 1, batch=12),
        "microbatch": mesh_or_error(2, 4, batch=16, microbatches=4),
        "evaluation": mesh_or_error(-1, 1, evaluation=20),
    }

    mesh = jax.make_mesh((1, 2, 4, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    rng = np.random.default_rng(0)
    host = {
        "stack": rng.normal(size=(4, 256, 128)).astype(np.float32),
        "table": rng.normal(size=(1024, 96)).astype(np.float32),
        "bias": np.arange(7, dtype=np.float32),
    }
    placed = sharding.place(host, mesh, RULES)
    found["place"] = {
        name: {
            "shard": x.addressable_shards[0].data.shape,
            "parts": len({str(s.index) for s in x.addressable_shards}),
            "equal": x.dtype == host[name].dtype and np.array_equal(x, host[name]),
        }
        for name, x in placed.items()
    }
    batch = sharding.place_batch({"image": np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)}, mesh)["image"]
    found["batch"] = {"shards": sorted(s.data.tolist() for s in batch.addressable_shards), "type": str(batch.dtype)}
    constrain = jax.jit(lambda x: sharding.constrain_batch({"x": x}, mesh, axis=1)["x"])
    found["constrained"] = constrain(jnp.ones((3, 8, 5))).addressable_shards[0].data.shape

    view = jax.jit(lambda p: sharding.decode_view(p, mesh, jnp.bfloat16, RULES))(placed)
    found["view"] = {
        name: [x.is_fully_replicated, str(x.dtype), np.array_equal(x, host[name].astype(jnp.bfloat16))]
        for name, x in view.items()
    }

    split = (("bias", Split.COPIED), (".*", Split.ROWS))
    both = jax.make_mesh((1, 2, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    parts = sharding.place(host, both, split)
    kept = jax.jit(lambda p: sharding.decode_view(p, both, jnp.bfloat16, split))(parts)
    found["tensor"] = {
        name: [parts[name].addressable_shards[0].data.shape, kept[name].addressable_shards[0].data.shape]
        for name in host
    }

    square = sharding.place({"w": rng.normal(size=(3, 256, 256)).astype(np.float32)}, mesh, RULES)["w"]
    rows = jax.device_put(rng.normal(size=(8, 256)).astype(np.float32), sharding.batch_sharding(mesh, 8))
    keys = jax.random.split(jax.random.key(0), 8)

    def viewed(w, h, k):
        return rollout(sharding.decode_view({"w": w}, mesh, jnp.float32, RULES)["w"], h, k, mesh)

    def direct(w, h, k):
        return rollout(w, h, k, mesh)

    compiled = {f.__name__: jax.jit(f).lower(square, rows, keys).compile() for f in (viewed, direct)}
    found["gathers"] = {name: gathers(step.as_text()) for name, step in compiled.items()}
    found["samples"] = {name: np.asarray(step(square, rows, keys)).tolist() for name, step in compiled.items()}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
    environment = devices.environment(8, PYTHONPATH=str(Path(base.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-m", __name__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["devices"] == 8
    return values


@pytest.mark.parametrize(
    "name, expected",
    [
        ("default", [1, 8, 1, 1]),
        ("fsdp", [1, 1, 8, 1]),
        ("both", [1, 2, 4, 1]),
        ("given", [1, 4, 2, 1]),
        ("accumulated", [1, 2, 4, 1]),
        ("devices", [1, 2, 1, 1]),
        ("tensor", [1, 2, 2, 2]),
        ("slices", [2, 1, 2, 2]),
        ("some", [1, 1, 2, 4]),
    ],
)
def test_meshes(found, name, expected):
    assert found["meshes"][name] == expected


@pytest.mark.parametrize(
    "name, words",
    [
        ("few", ["config.mesh", "data=1", "fsdp=4", "8 devices"]),
        ("many", ["config.mesh", "data=4, fsdp=4", "8 devices"]),
        ("uneven", ["config.mesh", "fsdp=3"]),
        ("two", ["config.mesh", "data=-1, fsdp=-1"]),
        ("zero", ["config.mesh", "data=0"]),
        ("negative", ["config.mesh", "data=-2"]),
        ("unknown", ["config.mesh.expert", "slice, data, fsdp, tensor"]),
        ("batch", ["config.data.batch_size", "= 12 images", "data=8"]),
        ("microbatch", ["rl.microbatches", "= 4 images", "data=2"]),
        ("evaluation", ["config.eval.batch_size = 20", "multiple of 8"]),
    ],
)
def test_mesh_errors_name_the_field(found, name, words):
    message = found["meshes"][name]
    assert isinstance(message, str) and "\n" not in message
    assert all(word in message for word in words), message


def test_place(found):
    shards = {name: (tuple(x["shard"]), x["parts"]) for name, x in found["place"].items()}
    assert shards == {"stack": ((4, 64, 128), 4), "table": ((256, 96), 4), "bias": ((7,), 1)}
    assert all(x["equal"] for x in found["place"].values())


def test_batches_are_split_over_both_axes(found):
    assert found["batch"] == {"shards": [[[3 * i, 3 * i + 1, 3 * i + 2]] for i in range(8)], "type": "uint8"}
    assert found["constrained"] == [3, 1, 5]


def test_decode_view_is_replicated_in_the_compute_type(found):
    assert found["view"] == {name: [True, "bfloat16", True] for name in ("stack", "table", "bias")}


def test_the_view_stays_split_by_tensor(found):
    assert found["tensor"] == {
        "stack": [[4, 128, 64], [4, 128, 128]],
        "table": [[512, 48], [512, 96]],
        "bias": [[7], [7]],
    }


def test_decode_view_without_a_mesh_is_a_cast():
    found = sharding.decode_view({"a": jnp.ones(3)}, None, jnp.bfloat16, ())
    assert found["a"].dtype == jnp.bfloat16
    assert sharding.constrain_batch("anything", None) == "anything"


def test_decode_view_moves_the_gathers_out_of_the_token_loop(found):
    inside, outside = found["gathers"]["viewed"]
    assert inside == 0 and outside > 0
    assert found["gathers"]["direct"][0] > 0, "without the view the loop must gather, or this test could not tell"
    assert found["samples"]["viewed"] == found["samples"]["direct"]


if __name__ == "__main__":
    on_eight_devices()
