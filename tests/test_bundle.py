"""UniWorld-V1's bundle, split into the parts that it holds, bit for bit."""

import json

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from tests.test_convert import tensors, write
from tests.test_lora_dit import FLUX
from tests.test_qwen2_5_vl import TINY
from uae_jax.convert import __main__ as convert
from uae_jax.convert import bundle, folder, pooled, table
from uae_jax.errors import UserError
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.projector import model as projector

WIDTH = TINY.text.hidden_size


@pytest.fixture
def parts(tmp_path):
    """(tensors of captioner, projector and transformer; folder with weights/ of a FLUX and bundle/)."""
    rng = np.random.default_rng(0)
    flux = {
        name: rng.standard_normal(entry.shape).astype(np.float32)
        for entry in flux_weights.table(FLUX)
        for name in table.flat_names(entry.names)
    }
    mapper = projector.table(projector.Config(WIDTH, 18, 6))
    found = {"captioner": tensors(), "transformer": flux}
    found["projector"] = {entry.names: rng.standard_normal(entry.shape).astype(np.float32) for entry in mapper}
    everything = dict(found["captioner"])
    for name, prefix in (("transformer", "denoise_tower.denoiser."), ("projector", "denoise_tower.denoise_projector.")):
        everything |= {prefix + key: value for key, value in found[name].items()}
    everything["denoise_tower.siglip_projector.0.weight"] = np.zeros((3, 2), np.float32)
    write(tmp_path / "bundle", everything)
    config = TINY.to_hf() | {"architectures": [bundle.CLASS_NAME], "model_type": "univa_qwen2p5vl"}
    config["denoise_tower"] = {
        "denoiser_type": "flux",
        "denoise_projector_type": "mlp2x_gelu",
        "output_hidden_size": 6,
        "denoiser_config": {k: v for k, v in FLUX.to_hf().items() if k != "_class_name"},
    }
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    host = {entry.path: np.zeros(table.param_shape(entry), np.float32) for entry in flux_weights.table(FLUX)}
    folder.save_model(tmp_path / "weights" / "transformer", FLUX, traverse_util.unflatten_dict(host, sep="/"))
    pooled.write(tmp_path / "weights" / "transformer" / pooled.FILE, np.arange(5.0))
    return found, tmp_path


def test_every_part_is_that_of_the_bundle(parts, capsys):
    found, where = parts
    convert.main(["", "import", str(where / "bundle"), str(where / "weights")])
    assert "1 tensors of its editing streams left out" in capsys.readouterr().out
    for part, expected in found.items():
        read = folder.open_model(where / "weights" / part)
        assert read.tensors.keys() == expected.keys()
        assert all(np.array_equal(read.tensors[name], value) for name, value in expected.items())
    assert folder.load_model(where / "weights" / "captioner").config == TINY
    assert folder.load_model(where / "weights" / "transformer").config == FLUX
    assert folder.load_model(where / "weights" / "projector").config == projector.Config(
        WIDTH, 18, 6, activation="silu"
    )
    np.testing.assert_array_equal(pooled.read(where / "weights" / "transformer" / pooled.FILE, 5), np.arange(5.0))
    assert (where / "weights" / "captioner" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="captioner exists"):
        convert.main(["", "import", str(where / "bundle"), str(where / "weights")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t: t.pop("denoise_tower.denoiser.x_embedder.bias"), "transformer: missing: x_embedder.bias"),
        (lambda c, t: t.update(other=np.zeros(1, np.float32)), "captioner: unexpected: other"),
        (lambda c, t: c["denoise_tower"].pop("denoiser_config"), "denoiser_config"),
        (lambda c, t: c["denoise_tower"].update(denoiser_type="sana"), "'sana'"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(parts, change, said):
    _, where = parts
    source = where / "bundle"
    config = json.loads((source / "config.json").read_text())
    raw = {name: np.array(x) for name, x in bundle.files.map_tensors(bundle.files.read_headers(source)[1]).items()}
    change(config, raw)
    (source / "config.json").write_text(json.dumps(config))
    save_file(raw, source / "model.safetensors")
    with pytest.raises(UserError, match=said) as caught:
        convert.main(["", "import", str(source), str(where / "weights")])
    assert "\n" not in str(caught.value) and [x.name for x in (where / "weights").iterdir()] == ["transformer"]
