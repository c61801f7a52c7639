"""Model folders in and out: bits, names, places on the mesh, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import uae_jax
from tests import devices
from tests.test_qwen2_5_vl import TINY
from uae_jax import sharding
from uae_jax.convert import __main__ as command
from uae_jax.convert import files, folder, memory, transfer
from uae_jax.convert.table import flat_names, param_shape
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.weights import canonical, module_name, table

TIED = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, tie_word_embeddings=True))
COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}',
    "preprocessor_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "merges.txt": "a b",
    "LICENSE": "free",
}


def tensors(config=TINY, dtype=np.float32, seed=0):
    """Random tensors of a model, under the hub's names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=entry.shape).astype(dtype) for entry in table(config) for name in flat_names(entry.names)
    }


def write(target, found=None, config=TINY, shards=1):
    """A model folder by the reference writer: config, tensors in so many files, companions, and things to leave out."""
    found = tensors(config) if found is None else found
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config.to_hf()))
    for name, text in (COMPANIONS | {"modeling.py": "raise SystemExit", "README.md": "of the original"}).items():
        (target / name).write_text(text)
    if shards == 1:
        save_file(found, target / "model.safetensors", metadata={"format": "pt"})
        return target
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(found)}
    for file in set(places.values()):
        part = {name: x for name, x in found.items() if places[name] == file}
        save_file(part, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def stored(model):
    """{name: (type, shape, bytes)} of all safetensors of a folder, by the reference reader."""
    found = {}
    for path in model.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                x = file.get_tensor(name)
                assert name not in found
                found[name] = (str(x.dtype), x.shape, x.tobytes())
    return found


def leaves(params):
    return traverse_util.flatten_dict(params, sep="/")


def left(parent):
    """Everything in a folder, temporary or not."""
    return sorted(path.name for path in parent.iterdir())


# ---- names -----------------------------------------------------------------------------------------------------------


def test_key_layouts():
    for entry in table(TINY):
        for name in flat_names(entry.names):
            assert canonical(name) == name
            assert canonical(module_name(name)) == name
    assert module_name("model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"
    assert module_name("visual.merger.ln_q.weight") == "model.visual.merger.ln_q.weight"
    assert module_name("lm_head.weight") == "lm_head.weight"


# ---- round trip ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(
    newer=st.booleans(),
    tied=st.sampled_from(["untied", "tied", "stored twice"]),
    dtypes=st.lists(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.float64]), min_size=1, max_size=3),
    shards=st.integers(1, 3),
    shard_bytes=st.sampled_from([1, 3000, 20000, files.SHARD_BYTES]),
    seed=st.integers(0, 2**31),
)
def test_round_trip(newer, tied, dtypes, shards, shard_bytes, seed):
    """Import and export keep every bit (NaNs too), type and name, whatever the layout and the number of files."""
    config = TINY if tied == "untied" else TIED
    rng = np.random.default_rng(seed)
    found = {}
    for i, (name, x) in enumerate(tensors(config).items()):
        dtype = np.dtype(dtypes[i % len(dtypes)])
        bits = np.frombuffer(rng.bytes(x.size * dtype.itemsize), dtype).reshape(x.shape)
        found[module_name(name) if newer else name] = bits
    if tied == "stored twice":
        found["lm_head.weight"] = found[
            module_name("model.embed_tokens.weight") if newer else "model.embed_tokens.weight"
        ]
    with tempfile.TemporaryDirectory() as scratch:
        source = write(Path(scratch) / "source", found, config, shards)
        transfer.copy_model(source, Path(scratch) / "imported", shard_bytes=shard_bytes)
        transfer.copy_model(Path(scratch) / "imported", Path(scratch) / "exported", shard_bytes=shard_bytes // 2 + 1)
        expected = {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in found.items()}
        assert stored(Path(scratch) / "imported") == expected
        assert stored(Path(scratch) / "exported") == expected
        assert left(Path(scratch)) == ["exported", "imported", "source"]


def test_shards_and_index(tmp_path):
    """As save_pretrained: numbered files below the limit, and an index that is right."""
    source = write(tmp_path / "source")
    transfer.copy_model(source, tmp_path / "out", shard_bytes=20000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    total = 0
    for path in shards:
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
            size = sum(file.get_tensor(name).nbytes for name in names)
        assert size <= 20000
        assert (path.stat().st_size - size) % 8 == 0, "data begin where any type may"
        total += size
        assert {index["weight_map"].pop(name) for name in names} == {path.name}
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}


def test_companions_come_along(tmp_path):
    source = write(tmp_path / "source", shards=2)
    transfer.copy_model(source, tmp_path / "out")
    assert left(tmp_path / "out") == sorted([*COMPANIONS, "config.json", "model.safetensors"])
    for name in [*COMPANIONS, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_a_fresh_model_has_the_names_of_the_hub(tmp_path):
    params = folder.load_model(write(tmp_path / "source")).params
    folder.save_model(tmp_path / "fresh", TINY, params, np.float16)
    transfer.copy_model(tmp_path / "fresh", tmp_path / "out")
    found = stored(tmp_path / "out")
    assert found.keys() == tensors().keys()
    assert {dtype for dtype, _, _ in found.values()} == {"float16"}


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_loading_is_the_same_for_all_layouts(tmp_path):
    found = tensors(dtype=ml_dtypes.bfloat16)
    newer = {module_name(name): x for name, x in found.items()}
    first = leaves(folder.load_model(write(tmp_path / "a", found)).params)
    second = leaves(folder.load_model(write(tmp_path / "b", newer, shards=3)).params)
    assert first.keys() == second.keys() == {entry.path for entry in table(TINY)}
    for name, x in first.items():
        assert x.dtype == np.float32 and np.array_equal(x, second[name])
    kernel = first["language/layers/self_attn/q_proj/kernel"]
    assert np.array_equal(kernel[1], found["model.layers.1.self_attn.q_proj.weight"].T.astype(np.float32))
    half = leaves(folder.load_model(tmp_path / "b", dtype=ml_dtypes.bfloat16).params)
    assert half["language/norm/scale"].dtype == ml_dtypes.bfloat16


def test_opening_reads_headers_only(tmp_path):
    """Tensors are views of the files: transposing and slicing them reads nothing and takes no memory."""
    source = write(tmp_path / "source", shards=2)
    found = folder.open_model(source)
    for x in found.tensors.values():
        base = x
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap) and not x.flags.writeable
        assert np.shares_memory(x.T, x)


def on_eight_devices(source):
    """Looks at a model placed on a mesh; run by the test below in a process with 8 virtual devices."""
    mesh = jax.make_mesh((1, 2, 4, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    sizes = []
    read = folder.tables.read

    def spy(*args):
        out = read(*args)
        sizes.append(out.nbytes)
        return out

    folder.tables.read = spy
    placed = leaves(folder.load_model(Path(source), mesh, jnp.bfloat16).params)
    folder.tables.read = read
    host = leaves(folder.load_model(Path(source)).params)
    split = {name: x.addressable_shards[0].data.shape for name, x in placed.items() if not x.is_fully_replicated}
    on_first = sum(x.addressable_shards[0].data.nbytes for x in placed.values())
    equal = all(
        x.dtype == jnp.bfloat16 and np.array_equal(np.asarray(x), host[name].astype(jnp.bfloat16))
        for name, x in placed.items()
    )
    found = folder.open_model(Path(source))
    memory.host_available = lambda: 800
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "equal": equal,
                "split": split,
                "on_first": on_first,
                "needed": memory.needed(found.table, jnp.bfloat16, mesh, folder.rules_of(found.config, mesh)),
                "available": memory.available(mesh),
                "all_read": sum(sizes),
                "largest_read": max(sizes),
                "parameters": sum(x.size for x in host.values()),
            }
        )
    )


WIDE = dataclasses.replace(
    TINY, text=dataclasses.replace(TINY.text, vocab_size=4096, intermediate_size=1400, tie_word_embeddings=True)
)


def test_every_part_goes_straight_to_its_device(tmp_path):
    """Of 8 devices, each tensor's slices are read once, and never more of it than one device holds."""
    source = write(tmp_path / "source", tensors(WIDE), WIDE, shards=2)
    environment = devices.environment(8, PYTHONPATH=str(Path(uae_jax.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_convert import *; on_eight_devices({str(source)!r})"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == 8 and found["equal"]
    mlp = "language/layers/mlp"
    assert found["split"] == {
        "language/embed_tokens/embedding": [1024, 24],
        f"{mlp}/gate_proj/kernel": [2, 24, 350],
        f"{mlp}/up_proj/kernel": [2, 24, 350],
        f"{mlp}/down_proj/kernel": [2, 350, 24],
    }
    assert found["on_first"] == found["needed"]
    assert found["available"] == 100, "virtual devices share the host's memory"
    assert found["all_read"] == 2 * found["parameters"], "bytes in bfloat16, each once for 8 devices"
    assert found["largest_read"] == 1024 * 24 * 2


def test_too_little_memory_is_told_before_loading(tmp_path, monkeypatch):
    source = write(tmp_path / "source")
    monkeypatch.setattr(memory, "host_available", lambda: 1000)
    monkeypatch.setattr(folder.tables, "read", lambda *_: pytest.fail("something was read"))
    mesh = jax.make_mesh((1, 1, 1, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    count = sum(np.prod(param_shape(entry)) for entry in table(TINY))
    assert memory.needed(table(TINY), np.float32, None, ()) == 4 * count
    for on, words in ((None, "larger machine"), (mesh, "config.mesh.fsdp")):
        with pytest.raises(UserError) as caught:
            folder.load_model(source, on)
        message = str(caught.value)
        assert words in message and "0.0 GiB are available" in message and str(source) in message
    monkeypatch.setattr(memory, "host_available", lambda: 4 * count)
    memory.check("here", table(TINY), np.float32, None, ())
    monkeypatch.setattr(memory, "host_available", lambda: None)
    memory.check("here", table(TINY), np.float32, mesh, folder.rules_of(TINY, mesh))


def test_memory_of_an_accelerator(monkeypatch):
    class Device:
        platform = "tpu"

        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30}

    class Mesh:
        local_devices = (Device(),)

    assert memory.available(Mesh()) == 70
    assert memory.host_available() is None or memory.host_available() > 2**20


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once(tmp_path):
    found = tensors()
    del found["visual.merger.mlp.0.bias"]
    found["model.norm.weight"] = found["model.norm.weight"][:-1]
    found["model.embed_tokens.weight"] = np.zeros((32, 24), np.int8)
    found["model.visual.merger.ln_q.weight"] = found["visual.merger.ln_q.weight"]
    found["model.layers.2.mlp.up_proj.weight"] = np.zeros((28, 24), np.float32)
    source = write(tmp_path / "source", found, shards=2)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        transfer.copy_model(source, tmp_path / "out")
    message = str(caught.value)
    for problem in (
        "missing: visual.merger.mlp.0.bias (64,)",
        "shape of model.norm.weight: expected (24,), found (23,)",
        "type of model.embed_tokens.weight: expected one of F64, F32, F16, BF16, found I8",
        "twice: visual.merger.ln_q.weight, as ",
        "unexpected: model.layers.2.mlp.up_proj.weight (28, 24)",
        "not in the index: lm_head.weight",
        "missing: ghost, in model-00001-of-00002.safetensors",
    ):
        assert problem in message
    assert message.count(";") == 6 and "\n" not in message and message.startswith(str(source))
    assert left(tmp_path) == ["source"]


def test_a_tensor_in_two_files(tmp_path):
    source = write(tmp_path / "source", shards=2)
    file = source / "model-00002-of-00002.safetensors"
    with safe_open(file, "numpy") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    first = next(name for name in index if name not in found)
    save_file(found | {first: tensors()[first]}, file)
    with pytest.raises(UserError, match=f"twice: {first}, in model-00001-of-00002.safetensors and model-00002"):
        folder.open_model(source)


def test_a_tied_head_that_differs(tmp_path):
    found = tensors(TIED)
    found["lm_head.weight"] = found["model.embed_tokens.weight"] + 1
    with pytest.raises(UserError, match=r"ties lm_head.weight to .*, but they differ"):
        folder.open_model(write(tmp_path / "source", found, TIED))


def spoil(source, how):
    """Makes a model folder of two shards unusable."""
    config, shard = source / "config.json", source / "model-00002-of-00002.safetensors"
    if how == "architecture":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    elif how == "model_type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "qwen2_vl"}))
    elif how == "no config":
        config.unlink()
    elif how == "broken config":
        config.write_text("{")
    elif how == "list config":
        config.write_text("[]")
    elif how == "missing shard":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif how == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif how == "broken index":
        (source / "model.safetensors.index.json").write_text("{}")
    elif how in ("pickles", "nothing"):
        for path in source.glob("model*"):
            path.unlink()
        if how == "pickles":
            (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


BAD = {
    "architecture": "config.json: architecture 'LlamaForCausalLM' is not one of",
    "model_type": "source/config.json: model_type is 'qwen2_vl', expected 'qwen2_5_vl'",
    "no config": "has no config.json",
    "broken config": "config.json is not JSON",
    "list config": "config.json is not a JSON object",
    "missing shard": "model-00002-of-00002.safetensors missing, though model.safetensors.index.json names it",
    "truncated": "model-00002-of-00002.safetensors is damaged or truncated",
    "pointer": "model-00002-of-00002.safetensors is damaged or truncated",
    "broken index": "model.safetensors.index.json is not an index",
    "pickles": "where torch is installed, run python -c",
    "nothing": "model.safetensors is missing",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input(tmp_path, how):
    source = write(tmp_path / "source", shards=2)
    spoil(source, how)
    with pytest.raises(UserError) as caught:
        command.main(["convert", "import", str(source), str(tmp_path / "out")])
    assert BAD[how] in str(caught.value) and "\n" not in str(caught.value)
    assert left(tmp_path) == ["source"]


def test_from_a_shell(tmp_path):
    """One line and exit code 2; nothing is left."""
    source = write(tmp_path / "source", shards=2)
    spoil(source, "truncated")
    done = subprocess.run(
        [sys.executable, "-m", "uae_jax.convert", "import", str(source), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(Path(uae_jax.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert left(tmp_path) == ["source"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, error):
    source = write(tmp_path / "source")
    real, seen = transfer._tensors, []

    def failing(*args):
        for i, item in enumerate(real(*args)):
            if i == 30:
                seen.extend(left(tmp_path))
                raise error
            yield item

    monkeypatch.setattr(transfer, "_tensors", failing)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        transfer.copy_model(source, tmp_path / "out", shard_bytes=5000)
    assert "out" not in seen and len(seen) == 2, "it is written under another name"
    assert left(tmp_path) == ["source"]


def test_only_new_folders_are_written(tmp_path):
    source = write(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    for target in (tmp_path / "full", source / "config.json", source):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            transfer.copy_model(source, target)
    assert left(tmp_path / "full") == ["mine"]
    (tmp_path / "empty").mkdir()
    transfer.copy_model(source, tmp_path / "empty")
    transfer.copy_model(source, tmp_path / "new" / "parents")
    assert stored(tmp_path / "empty") == stored(tmp_path / "new" / "parents") == stored(source)


@pytest.mark.parametrize("words", [[], ["import", "a"], ["move", "a", "b"], ["import", "a", "b", "--adapter"]])
def test_usage(words):
    with pytest.raises(UserError, match="usage: python -m"):
        command.main(["convert", *words])


@pytest.mark.parametrize("name", ["projector", "transformer", "clip", "judge"])
def test_other_models_take_the_same_way(weights, tmp_path, name):
    transfer.copy_model(weights / name, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(weights / name)
