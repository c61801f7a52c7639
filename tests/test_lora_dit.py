"""Adapters of a DiT in diffusers' format, merged at import."""

import json

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from uae_jax.convert import __main__ as convert
from uae_jax.convert import folder, table
from uae_jax.errors import UserError
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.sd3 import weights as sd3_weights

SD3 = sd3_config.Config(8, 2, 4, 4, 4, 2, 6, 8, 5, 4, 4, (0,), "rms_norm")
FLUX = flux_config.Config(8, 2, 2, 6, 2, 6, 5, True, axes_dims_rope=(2, 2, 2))
# (layer, rank): some of every kind, of different ranks; the rest of their stacks has none
LAYERS = {
    "sd3": [("transformer_blocks.2.attn.to_q", 2), ("transformer_blocks.0.attn2.to_out.0", 3), ("context_embedder", 1)],
    "flux": [("transformer_blocks.1.ff.net.0.proj", 2), ("single_transformer_blocks.0.proj_out", 3), ("x_embedder", 1)],
}


@pytest.fixture(params=["sd3", "flux"])
def adapted(request, tmp_path):
    """A folder with dit/ and lora.safetensors, whose tensors follow, and the weight each adapter stands for."""
    rng = np.random.default_rng(0)
    config, entries = (SD3, sd3_weights.table(SD3)) if request.param == "sd3" else (FLUX, flux_weights.table(FLUX))
    flat = {entry.path: rng.standard_normal(table.param_shape(entry)).astype(np.float32) for entry in entries}
    folder.save_model(tmp_path / "dit", config, traverse_util.unflatten_dict(flat, sep="/"))
    base = folder.open_model(tmp_path / "dit").tensors
    found, merged = {}, {}
    for layer, rank in LAYERS[request.param]:
        out, inputs = base[f"{layer}.weight"].shape
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, inputs), (out, rank)))
        found |= {f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}
        merged[f"{layer}.weight"] = (b @ a, rank)
    return tmp_path, found, merged


def run(where, found, alpha=None, out="out"):
    note = {} if alpha is None else {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})}
    save_file(found, where / "lora.safetensors", metadata={"format": "pt", **note})
    convert.main(["", "import", str(where / "dit"), str(where / out), f"--lora={where}/lora.safetensors"])
    return folder.open_model(where / out).tensors


def test_every_adapter_and_nothing_else_is_merged(adapted):
    """With alpha = r where the file says nothing, a common alpha by its metadata, and one of a layer's own."""
    where, found, merged = adapted
    before = folder.open_model(where / "dit").tensors
    own = next(iter(merged)).removesuffix(".weight")
    for out, alpha, more in (
        ("none", None, {}),
        ("common", 6.0, {}),
        ("own", 6.0, {f"transformer.{own}.alpha": np.array(4.0, np.float32)}),
    ):
        after = run(where, found | more, alpha, out)
        assert {name for name in before if not np.array_equal(before[name], after[name])} == set(merged)
        for name, (product, rank) in merged.items():
            scale = 1.0 if alpha is None else (4.0 if more and name.startswith(own) else alpha) / rank
            np.testing.assert_allclose(after[name], before[name] + scale * product, rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(adapted):
    where, found, _ = adapted
    name = next(name for name in found if "lora_A" in name)
    cut = np.ascontiguousarray(found[name][:, :-1])
    without = {k: v for k, v in found.items() if k != name}
    for wrong, said in (
        (found | {"transformer.other.lora_A.weight": cut}, "unexpected other"),
        (found | {name: cut}, "the layer"),
        (without, "only one of"),
        ({}, "holds no adapters"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            run(where, wrong)
        assert "\n" not in str(caught.value) and not (where / "out").exists()
    with pytest.raises(UserError, match="usage"):
        convert.main(["", "export", str(where / "dit"), str(where / "out"), "--lora=x"])
