"""What a run has trained, on its way out: merged into the weights it started from, or as a PEFT adapter."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from tests import tiny
from tests.test_convert import TIED, leaves, left, stored, tensors, write
from tests.test_qwen2_5_vl import TINY
from uae_jax import checkpoint, train
from uae_jax.convert import __main__ as command
from uae_jax.convert import folder, lora, transfer
from uae_jax.convert.table import param_shape
from uae_jax.errors import UserError
from uae_jax.models.qwen2_5_vl.weights import module_name, table
from uae_jax.step import State

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


def test_training_with_adapters_changes_their_kernels_alone(weights, tmp_path):
    """From the config to the exported folder, with nothing made by hand."""
    config = tiny.config(
        weights, steps=2, lora__rank=2, lora__target=PART, optimizer__learning_rate=0.01, rl__group_size=2
    )
    train.run(config, tmp_path / "run")
    command.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "out")])
    start, found = (leaves(folder.load_model(path).params) for path in (weights / "captioner", tmp_path / "out"))
    assert {path for path in start if not np.array_equal(start[path], found[path])} == {f"{PART}/kernel"}
    command.main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 1e5


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
