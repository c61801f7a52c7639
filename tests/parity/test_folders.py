"""Whole model folders: what the reference classes save is read, and what is written they read, bit for bit."""

import jax
import numpy as np
import pytest

from tests.parity import test_flux, test_sd3, test_text_encoders, test_vae
from tests.parity.conftest import redraw, tensors
from uae_jax.convert import folder
from uae_jax.errors import UserError

torch = pytest.importorskip("torch", reason="pip install '.[parity]'")
diffusers = pytest.importorskip("diffusers", reason="pip install '.[parity]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[parity]'")

CONFIGS = {
    "SD3Transformer2DModel": test_sd3.MEDIUM,
    "FluxTransformer2DModel": test_flux.DEV,
    "AutoencoderKL": test_vae.TINY,
    "CLIPTextModelWithProjection": test_text_encoders.CLIP,
    "T5EncoderModel": test_text_encoders.T5,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_out_and_in_again(name, tmp_path):
    config = CONFIGS[name]
    library = diffusers if hasattr(diffusers, name) else transformers
    stem = "diffusion_pytorch_model" if library is diffusers else "model"
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"

    hf = config.to_hf()
    reference_class = getattr(library, name)
    if library is diffusers:
        reference = reference_class.from_config(hf)
    else:
        reference = reference_class(reference_class.config_class.from_dict(hf))
    redraw(reference)
    reference.save_pretrained(theirs)
    (theirs / f"{stem}.safetensors").rename(theirs / folder.WEIGHTS)
    model = folder.load_model(theirs)
    assert model.config == config

    folder.save_model(ours, model.config, model.params)
    again = folder.load_model(ours)
    assert again.config == config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (ours / folder.WEIGHTS).rename(ours / f"{stem}.safetensors")
    loaded, report = reference_class.from_pretrained(ours, output_loading_info=True)
    assert not any(report.values())
    expected = tensors(reference)
    for key, value in tensors(loaded).items():
        assert value.dtype == expected[key].dtype and np.array_equal(value, expected[key]), key


def test_fluxs_text_tower_is_written_as_on_the_hub(tmp_path):
    """Under the prefix that transformers 5 leaves out of its own files, and reads."""
    config = test_text_encoders.clip_variant(40, "gelu", projection=None)
    reference, params = test_text_encoders.build_clip(config)
    folder.save_model(tmp_path, config, params)
    assert folder.load_model(tmp_path).config == config
    loaded, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for key, value in tensors(loaded).items():
        assert np.array_equal(value, tensors(reference)[key]), key


def test_a_transformer_of_another_kind(tmp_path):
    """FLUX's weights under SD3's config: one line that says what does not fit."""
    reference = diffusers.FluxTransformer2DModel.from_config(test_flux.DEV.to_hf())
    reference.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / folder.WEIGHTS)
    diffusers.SD3Transformer2DModel.from_config(test_sd3.MEDIUM.to_hf()).save_config(tmp_path)
    with pytest.raises(UserError, match=r"missing: context_embedder|unexpected: single_transformer_blocks") as caught:
        folder.load_model(tmp_path)
    assert "\n" not in str(caught.value)
