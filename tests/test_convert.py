"""Model folders in and out: bits, names, places on the mesh, and what is refused."""

import dataclasses
import json
import os
import shutil
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
from tests import tiny
from tests.test_qwen2_5_vl import TINY
from uae_jax import checkpoint
from uae_jax.convert import __main__ as command
from uae_jax.convert import files, folder, lora, memory, transfer
from uae_jax.convert.table import flat_names, param_shape
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.weights import canonical, module_name, table
from uae_jax.step import State

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


def test_opening_reads_headers_only(tmp_path, monkeypatch):
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
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
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
    print(
        json.dumps(
            {
                "devices": jax.device_count(),
                "equal": equal,
                "split": split,
                "on_first": on_first,
                "needed": memory.needed(found.table, jnp.bfloat16, mesh),
                "reads": len(sizes),
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
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(uae_jax.__file__).parents[1]),
    }
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
    assert found["all_read"] == 2 * found["parameters"], "bytes in bfloat16, each once for 8 devices"
    assert found["largest_read"] == 1024 * 24 * 2


def test_too_little_memory_is_told_before_loading(tmp_path, monkeypatch):
    source = write(tmp_path / "source")
    monkeypatch.setattr(memory, "host_available", lambda: 1000)
    monkeypatch.setattr(folder.tables, "read", lambda *_: pytest.fail("something was read"))
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    count = sum(np.prod(param_shape(entry)) for entry in table(TINY))
    assert memory.needed(table(TINY), np.float32, None) == 4 * count
    for on, words in ((None, "larger machine"), (mesh, "config.mesh.fsdp")):
        with pytest.raises(UserError) as caught:
            folder.load_model(source, on)
        message = str(caught.value)
        assert words in message and "0.0 GiB are available" in message and str(source) in message
    monkeypatch.setattr(memory, "host_available", lambda: 4 * count)
    memory.check("here", table(TINY), np.float32, None)
    monkeypatch.setattr(memory, "host_available", lambda: None)
    memory.check("here", table(TINY), np.float32, mesh)


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
    "pickles": "safe_serialization=True",
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


# ---- what a run has trained ------------------------------------------------------------------------------------------

PART = "language/layers/self_attn/q_proj"


def trained(found, alpha=1.0):
    return transfer.Trained({name: x.shape for name, x in found.items()}, found.__getitem__, alpha)


def adapters(rank=3, seed=0):
    """Of two stacked kernels of different shapes."""
    rng = np.random.default_rng(seed)
    shapes = {entry.path: param_shape(entry) for entry in table(TINY)}
    found = {}
    for path in (f"{PART}/kernel", "language/layers/mlp/down_proj/kernel"):
        for name, shape in zip(lora.paths(path), lora.shapes(shapes[path], rank), strict=True):
            found[name] = rng.normal(size=shape).astype(np.float32)
    return found


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_trained_parameters_replace_their_own(tmp_path, dtype):
    source = write(tmp_path / "source", tensors(dtype=dtype))
    kernel = np.random.default_rng(1).normal(size=(2, 24, 24)).astype(np.float32)
    head = np.random.default_rng(2).normal(size=(24, 32)).astype(np.float32)
    changes = {f"{PART}/kernel": kernel, "language/lm_head/kernel": head}
    transfer.copy_model(source, tmp_path / "out", trained(changes))
    expected = stored(source)
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        expected[name] = (*expected[name][:2], kernel[i].T.astype(dtype).tobytes())
    expected["lm_head.weight"] = (*expected["lm_head.weight"][:2], head.T.astype(dtype).tobytes())
    assert stored(tmp_path / "out") == expected


def test_a_tied_head_is_written_with_what_it_is_tied_to(tmp_path):
    found = tensors(TIED)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    embedding = np.ones((32, 24), np.float32)
    source = write(tmp_path / "source", found, TIED)
    transfer.copy_model(source, tmp_path / "out", trained({"language/embed_tokens/embedding": embedding}))
    assert stored(tmp_path / "out")["lm_head.weight"][2] == embedding.tobytes()
    folder.open_model(tmp_path / "out")


def test_adapters_are_merged(tmp_path):
    source, found, alpha = write(tmp_path / "source"), adapters(), 5.0
    transfer.copy_model(source, tmp_path / "out", trained(found, alpha))
    before, after = (leaves(folder.load_model(tmp_path / name).params) for name in ("source", "out"))
    for path, kernel in before.items():
        a, b = (found.get(name) for name in lora.paths(path))
        if path.endswith("/kernel") and a is not None:
            expected = np.einsum("lir,lro->lio", a.astype(np.float64), b.astype(np.float64)) * alpha / 3 + kernel
            assert np.abs(expected - kernel).max() > 1
            assert np.abs(after[path] - expected).max() < 1e-5
        else:
            assert np.array_equal(after[path], kernel)


def test_an_adapter_folder_holds_the_same(tmp_path):
    """From the files alone: W + alpha / r B A is the merged weight, of every module and only those."""
    source, found, alpha = write(tmp_path / "source"), adapters(), 5.0
    transfer.copy_model(source, tmp_path / "merged", trained(found, alpha))
    transfer.export_adapter(source, tmp_path / "adapter", trained(found, alpha))
    assert left(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(source)
    assert (config["r"], config["lora_alpha"]) == (3, alpha)
    parts = {
        name: np.frombuffer(data, np.float32).reshape(shape)
        for name, (_, shape, data) in stored(tmp_path / "adapter").items()
    }
    before, after = stored(source), stored(tmp_path / "merged")
    modules = set()
    for name, (_, shape, data) in before.items():
        module = module_name(name).removesuffix(".weight")
        if data == after[name][2]:
            assert not any(key.startswith(f"base_model.model.{module}.lora") for key in parts)
            continue
        modules.add(module)
        a, b = (parts.pop(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
        base, merged = (np.frombuffer(x, np.float32).reshape(shape) for x in (data, after[name][2]))
        assert np.abs(base + alpha / 3 * b @ a - merged).max() < 1e-5
    assert not parts
    assert modules == set(config["target_modules"]) and len(modules) == 4


@pytest.mark.parametrize(
    "found, problem",
    [
        ({f"{PART}/kernel": np.zeros((2, 24, 23))}, "q_proj/kernel: expected (2, 24, 24), found (2, 24, 23)"),
        ({"language/what": np.zeros(1)}, "language/what: expected nothing, found (1,)"),
        ({f"{PART}/lora_a": np.zeros((2, 24, 3))}, f"{PART}/lora_b: missing"),
        ({f"{PART}/lora_a": np.zeros((2, 24, 3)), f"{PART}/lora_b": np.zeros((2, 4, 24))}, "expected (2, 3, 24)"),
        ({f"{PART}/kernel": np.full((2, 24, 24), np.inf)}, "not finite"),
    ],
)
def test_what_belongs_to_another_model_is_refused(tmp_path, found, problem):
    with pytest.raises(UserError) as caught:
        transfer.copy_model(write(tmp_path / "source"), tmp_path / "out", trained(found))
    assert problem in str(caught.value)
    assert left(tmp_path) == ["source"]


def run_of(weights, workdir, changes, **fields):
    """A workdir as a run leaves it after 7 and 9 steps, with `changes` trained in the second checkpoint."""
    config = tiny.config(weights).to_dict() | fields
    checkpoint.write_config(workdir, config)
    with checkpoint.Checkpointer(workdir / "checkpoints", every=1) as saver:
        for step, factor in ((7, 0), (9, 1)):
            params = {"encoder": traverse_util.unflatten_dict({k: factor * v for k, v in changes.items()}, sep="/")}
            saver.save(step, State(jnp.int32(step), jax.random.key(0), params, {"moment": params}, jnp.int32(0)))
            saver._manager.wait_until_finished()
    return workdir


@pytest.fixture
def whole(weights):
    """All of the captioner's language parameters, changed."""
    start = leaves(folder.load_model(weights / "captioner").params)
    return {path: jnp.asarray(x + 0.5) for path, x in start.items() if path.startswith("language/")}


def test_a_run_is_exported(weights, whole, tmp_path, capsys):
    """The newest checkpoint over the start weights, in the names and types of these; without the optimizer's state."""
    workdir = run_of(weights, tmp_path / "run", whole)
    command.main(["convert", "export", str(workdir), str(tmp_path / "out")])
    assert f"step 9 of {workdir}" in capsys.readouterr().out
    start = leaves(folder.load_model(weights / "captioner").params)
    found = leaves(folder.load_model(tmp_path / "out").params)
    assert found.keys() == start.keys()
    for path, x in found.items():
        assert np.array_equal(x, whole.get(path, start[path])), path
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="trained whole parameters"):
        command.main(["convert", "export", str(workdir), str(tmp_path / "adapter"), "--adapter"])
    assert left(tmp_path) == ["out", "run"]


def test_a_run_with_adapters_is_exported(weights, tmp_path):
    start = leaves(folder.load_model(weights / "captioner").params)
    kernel = start[f"{PART}/kernel"]
    names, shapes = lora.paths(f"{PART}/kernel"), lora.shapes(kernel.shape, 2)
    a, b = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes))
    found = dict(zip(names, (a, b), strict=True))
    workdir = run_of(weights, tmp_path / "run", found, lora={"rank": 2, "alpha": 8.0, "target": PART})
    command.main(["convert", "export", str(workdir), str(tmp_path / "out")])
    merged = leaves(folder.load_model(tmp_path / "out").params)
    assert np.abs(merged[f"{PART}/kernel"] - (kernel + 4 * a @ b)).max() < 1e-5
    command.main(["convert", "export", str(workdir), str(tmp_path / "adapter"), "--adapter"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8.0)
    assert config["base_model_name_or_path"] == str(weights / "captioner")


def test_sources_of_an_export(weights, tmp_path):
    command.main(["convert", "export", str(weights), str(tmp_path / "out")])
    assert stored(tmp_path / "out") == stored(weights / "captioner")
    (tmp_path / "run").mkdir()
    checkpoint.write_config(tmp_path / "run", tiny.config(weights).to_dict())
    for source, problem in (
        (tmp_path / "run", "holds no complete checkpoint"),
        (tmp_path, "has no config.json"),
    ):
        with pytest.raises(UserError, match=problem):
            command.main(["convert", "export", str(source), str(tmp_path / "none")])
    with pytest.raises(UserError, match="is a model, not the workdir"):
        command.main(["convert", "export", str(tmp_path / "out"), str(tmp_path / "none"), "--adapter"])
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "run" / "config.json")
    with pytest.raises(UserError, match="neither a model's folder"):
        command.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "none")])


@pytest.mark.parametrize("name", ["projector", "transformer", "clip", "judge"])
def test_other_models_take_the_same_way(weights, tmp_path, name):
    transfer.copy_model(weights / name, tmp_path / "out")
    assert stored(tmp_path / "out") == stored(weights / name)
