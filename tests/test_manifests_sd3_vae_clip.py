"""Name tables of the released sizes against the released checkpoints' tensors (names and shapes, no weights)."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from uae_jax.convert.table import flat_names, param_shape
from uae_jax.models.clip import config as clip_config
from uae_jax.models.clip import model as clip_model
from uae_jax.models.clip import weights as clip_weights
from uae_jax.models.dinov2 import config as dinov2_config
from uae_jax.models.dinov2 import model as dinov2_model
from uae_jax.models.dinov2 import weights as dinov2_weights
from uae_jax.models.dinov3 import config as dinov3_config
from uae_jax.models.dinov3 import model as dinov3_model
from uae_jax.models.dinov3 import weights as dinov3_weights
from uae_jax.models.flux import config as flux_config
from uae_jax.models.flux import model as flux_model
from uae_jax.models.flux import weights as flux_weights
from uae_jax.models.sd3 import config as sd3_config
from uae_jax.models.sd3 import model as sd3_model
from uae_jax.models.sd3 import weights as sd3_weights
from uae_jax.models.siglip import config as siglip_config
from uae_jax.models.siglip import model as siglip_model
from uae_jax.models.siglip import weights as siglip_weights
from uae_jax.models.vae import config as vae_config
from uae_jax.models.vae import model as vae_model
from uae_jax.models.vae import weights as vae_weights

MANIFESTS = Path(__file__).parents[2] / "shared/manifests"
SD3 = (sd3_config.Config, sd3_weights.table, sd3_model.SD3Transformer)
FLUX = (flux_config.Config, flux_weights.table, flux_model.FluxTransformer)
VAE = (vae_config.Config, vae_weights.table, vae_model.AutoencoderKL)
CLIP = (clip_config.Config, clip_weights.table, clip_model.CLIP)
DINOV2 = (dinov2_config.Config, dinov2_weights.table, dinov2_model.DINOv2)
DINOV3 = (dinov3_config.Config, dinov3_weights.table, dinov3_model.DINOv3)
SIGLIP = (siglip_config.Config, siglip_weights.table, siglip_model.SigLIP)
MODELS: dict[str, Any] = {
    "sd3_5_medium": SD3,
    "sd3_5_large": SD3,
    "flux_1_dev": FLUX,
    "vae_sd3": VAE,
    "vae_flux": VAE,
    "clip_vit_l14": CLIP,
    "clip_vit_l14_336": CLIP,
    "longclip_l": CLIP,
    "dinov2_large": DINOV2,
    "dinov2_giant": DINOV2,
    "dinov3_vitl16": DINOV3,
    "dinov3_vith16plus": DINOV3,
    "dinov3_vit7b16": DINOV3,
    "siglip_large_384": SIGLIP,
}


def inputs(config: Any) -> list[jax.ShapeDtypeStruct]:
    """Arguments of one call, as shapes."""

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    match config:
        case sd3_config.Config():
            text, pooled = config.joint_attention_dim, config.pooled_projection_dim
            return [array(1, 128, 128, config.in_channels), array(1, 256, text), array(1, pooled), array(1)]
        case flux_config.Config():
            text, pooled = config.joint_attention_dim, config.pooled_projection_dim
            shapes = [(1, 64, 64, config.in_channels // 4), (1, 256, text), (1, pooled), (1,), (1, 256), (1,)]
            return [array(*shape) for shape in shapes]
        case vae_config.Config():
            return [array(1, 64, 64, config.in_channels)]
        case clip_config.Config():
            side = config.vision.image_size
            return [array(1, side, side, 3), array(1, config.text.max_position_embeddings, dtype=jnp.int32)]
        case dinov2_config.Config() | dinov3_config.Config():
            return [array(1, 224, 224, 3)]
        case siglip_config.Config():
            return [array(1, config.vision.image_size, config.vision.image_size, 3)]
    raise AssertionError(config)


@pytest.mark.parametrize("name", MODELS)
def test_table_equals_the_manifest_and_the_model(name):
    path = MANIFESTS / f"{name}.json.gz"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    manifest = json.loads(gzip.decompress(path.read_bytes()))
    config_class, make_table, model = MODELS[name]
    config = config_class.from_hf(manifest["config"])
    table = make_table(config)

    found = {tensor: entry.shape for entry in table for tensor in flat_names(entry.names)}
    assert sum(len(flat_names(entry.names)) for entry in table) == len(found)
    assert found == {tensor: tuple(shape) for tensor, shape in manifest["tensors"].items()}

    fresh = jax.eval_shape(model(config).init, jax.random.key(0), *inputs(config))
    shapes = {path: x.shape for path, x in traverse_util.flatten_dict(fresh["params"], sep="/").items()}
    assert shapes == {entry.path: param_shape(entry) for entry in table}
