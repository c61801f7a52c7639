"""What a tower's folder may hold beside its weights: its processing, honoured or refused, and buffers of old files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.test_unified_bench import CLIP_CONFIG
from uae_jax import pixels
from uae_jax.convert import folder
from uae_jax.errors import UserError
from uae_jax.models import initial
from uae_jax.models.clip.config import Config as CLIPConfig
from uae_jax.models.clip.model import CLIP
from uae_jax.models.dinov2.config import Config as DINOv2Config
from uae_jax.models.dinov3.config import Config as DINOv3Config
from uae_jax.models.siglip.config import Config as SigLIPConfig

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
# As the hub's files have them: numbers or objects, nulls, fields that say nothing here.
RELEASED = {
    "clip_2021": (
        CLIPConfig(), {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3} | CLIP_STATISTICS
    ),
    "clip": (
        CLIPConfig(),
        {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
         "rescale_factor": 0.00392156862745098, "do_convert_rgb": True} | CLIP_STATISTICS,
    ),
    "dinov2": (
        DINOv2Config(),
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
         "resample": 3} | IMAGENET,
    ),
    "dinov3": (
        DINOv3Config(),
        {"size": {"height": 224, "width": 224}, "crop_size": None, "do_center_crop": None, "resample": 2,
         "do_rescale": True, "rescale_factor": 0.00392156862745098} | IMAGENET,
    ),
    "siglip": (
        SigLIPConfig.from_hf({"model_type": "siglip", "vision_config": {"image_size": 384, "patch_size": 14}}),
        {"size": {"height": 384, "width": 384}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
}  # fmt: skip


def declared(where, values, name="preprocessor_config.json"):
    where.mkdir(exist_ok=True)
    (where / name).write_text(json.dumps(values))
    return where


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_say_what_the_classes_do(name, tmp_path):
    config, values = RELEASED[name]
    assert same(pixels.load(declared(tmp_path, values), config), pixels.processing(config))
    nested = declared(tmp_path / "nested", {"image_processor": values}, "processor_config.json")
    assert same(pixels.load(nested, config), pixels.processing(config))
    assert same(pixels.load(tmp_path / "none", config), pixels.processing(config))


def test_what_a_folder_declares_is_done(tmp_path):
    """SigLIP2 so400m is a SiglipModel that resizes bilinearly; a DINOv2 may see other sizes."""
    so400m = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = SigLIPConfig.from_hf(
        {
            "architectures": ["SiglipModel"], "model_type": "siglip",
            "vision_config": {**so400m, "image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"},
            "text_config": {**so400m, "vocab_size": 256000, "projection_size": 1152},
        }
    )  # fmt: skip
    shapes = {e.names: e.shape for e in folder.ARCHITECTURES["SiglipModel"].table(config) if isinstance(e.names, str)}
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (729, 1152)
    assert shapes["text_model.embeddings.token_embedding.weight"] == (256000, 1152)
    values = {"size": {"height": 384, "width": 384}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    how = pixels.load(declared(tmp_path, values), config)
    assert how.kernel == "linear" and how.eight_bit and how.shortest is None and how.size == 384
    values = {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}, "image_mean": [0.1, 0.2, 0.3]}
    how = pixels.load(declared(tmp_path, values), DINOv2Config())
    assert (how.size, how.shortest, how.mean.tolist()) == (40, 48, np.float32([0.1, 0.2, 0.3]).tolist())
    image = jnp.full((60, 50, 3), 0.5)
    np.testing.assert_allclose(pixels.process(image, how)[0, 0], (0.5 - how.mean) / how.std, atol=1e-6)
    pixels.save(tmp_path, how)
    assert same(pixels.load(tmp_path, DINOv2Config()), how)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"do_normalize": False, "do_resize": False}, r"do_resize is false; do_normalize is false"),
        ({"rescale_factor": 1 / 127.5}, "is not 1/255"),
        ({"resample": 1}, "resample 1 is neither"),
        ({"image_std": [0.5, 0.5]}, "image_std"),
        ({"image_mean": "gray"}, "image_mean"),
        ({"size": {"shortest_edge": 336}, "crop_size": 336}, "pictures of 336 pixels a side, .* image_size 224"),
        ({"size": {"shortest_edge": 200}}, "does not end in one square"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "does not end in one square"),
        ({"size": {"height": 224, "width": 448}, "do_center_crop": False}, "does not end in one square"),
        ({"crop_size": {"height": 224, "width": 200}}, "does not end in one square"),
        ({"size": {"longest_edge": 224}}, "does not end in one square"),
    ],
)
def test_contradictions_are_listed(values, said, tmp_path):
    with pytest.raises(UserError, match=f"preprocessor_config.json does not fit the tower: .*{said}"):
        pixels.load(declared(tmp_path, values), CLIPConfig())


def test_a_broken_file(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        pixels.load(tmp_path, CLIPConfig())


def test_position_ids_of_old_files_are_left_out_and_nothing_else(tmp_path):
    shapes = jax.eval_shape(
        lambda: initial(CLIP(CLIP_CONFIG), jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 5), int))
    )
    params = jax.tree.map(lambda x: np.random.default_rng(0).random(x.shape, np.float32), shapes)
    folder.save_model(tmp_path, CLIP_CONFIG, params)
    plain = folder.load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    numbers = {f"{x}_model.embeddings.position_ids": np.arange(5)[None] for x in ("text", "vision")}
    save_file(tensors | numbers, tmp_path / "model.safetensors")
    found = folder.load_model(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, plain.params))
    save_file(tensors | {"text_model.position_ids": np.arange(5)[None]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"unexpected: text_model\.position_ids"):
        folder.load_model(tmp_path)
