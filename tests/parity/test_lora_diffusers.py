"""Adapters of a DiT against torch: beside our kernels, merged into diffusers' weights, and loaded by its own loader."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.parity import test_flux, test_sd3
from uae_jax import lora as adapters
from uae_jax.convert import lora, table
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.umm.diffusion import merge

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")

RANK, ALPHA = 2, 5.0


@pytest.fixture(params=["sd3", "flux"])
def adapted(request):
    """(reference, its table, adapters by path, our output with them beside the kernels, the reference's as it runs)."""
    if request.param == "sd3":
        case, entries = test_sd3, sd3_weights.table
        config = dataclasses.replace(case.MEDIUM, num_layers=3, dual_attention_layers=(0,))
    else:
        case, entries = test_flux, flux_weights.table
        config = dataclasses.replace(case.DEV, num_layers=1, num_single_layers=2)
    reference, model, variables = case.build(config)
    rng = np.random.default_rng(0)
    fresh = adapters.initial(
        variables["params"], RANK, r"\w*block.*|x_embedder.*|context_embedder.*", jax.random.key(0)
    )
    flat = traverse_util.flatten_dict(fresh, sep="/")
    flat = {path: rng.standard_normal(x.shape).astype(np.float32) * 0.2 for path, x in flat.items()}
    inputs = case.draw(config)
    arguments = inputs if case is test_sd3 else case.ours(inputs)
    tree = adapters.scaled(traverse_util.unflatten_dict(flat, sep="/"), ALPHA)
    run = jax.jit(lambda p, *x: model.apply({"params": p}, *x))
    ours = [np.asarray(run(p, *arguments)) for p in (variables["params"], merge(variables["params"], tree))]
    assert np.abs(ours[0] - ours[1]).max() > 0.01

    def output():
        with torch.no_grad():
            if case is test_flux:
                return case.unpacked(reference(**case.to_torch(inputs)).sample).numpy()
            return reference(*case.to_torch(inputs)).sample.permute(0, 2, 3, 1).numpy()

    return reference, entries(config), flat, ours[1], output


def test_beside_a_kernel_is_merged_by_hand(adapted):
    reference, entries, flat, ours, output = adapted
    with torch.no_grad():
        for entry in entries:
            if not entry.path.endswith("/kernel") or lora.paths(entry.path)[0] not in flat:
                continue
            a, b = (flat[path] for path in lora.paths(entry.path))
            for index, name in table.indexed(entry.names):
                product = torch.from_numpy(b[index].T.copy()) @ torch.from_numpy(a[index].T.copy())
                reference.get_parameter(name).add_(product, alpha=ALPHA / RANK)
    np.testing.assert_allclose(ours, output(), rtol=0, atol=1e-4)


def test_diffusers_loads_what_is_written(adapted, tmp_path):
    pytest.importorskip("peft", reason="pip install peft")
    reference, entries, flat, ours, output = adapted
    lora.write_diffusers(tmp_path, entries, flat, flat.__getitem__, ALPHA)
    name = f"{lora.DIFFUSERS_STEM}.safetensors"
    reference.load_lora_adapter(tmp_path, weight_name=name, prefix="transformer", adapter_name="default")
    np.testing.assert_allclose(ours, output(), rtol=0, atol=1e-4)
    # ... and what it writes itself is read
    reference.save_lora_adapter(tmp_path / "theirs", weight_name="x.safetensors")
    read = lora.read_diffusers(tmp_path / "theirs" / "x.safetensors", entries)
    for path, value in flat.items():
        scale = ALPHA / RANK if path.endswith("lora_b") else 1.0
        np.testing.assert_allclose(read[path], value * scale, rtol=0, atol=1e-6)
