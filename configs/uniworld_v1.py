"""Unified-GRPO on UniWorld-V1: Qwen2.5-VL-7B writes, FLUX.1-dev draws, CLIP L/14 rewards; adapters are trained.

python -m uae_jax.convert import UNIWORLD_QWEN WEIGHTS/captioner
python -m uae_jax.convert import FLUX.1-dev WEIGHTS
python -m uae_jax.convert import clip-vit-large-patch14 WEIGHTS/clip
python -m uae_jax.main --config=configs/uniworld_v1.py --config.weights=WEIGHTS --config.data.path=IMAGES
python -m uae_jax.main --config=configs/uniworld_v1.py:runlocal

WEIGHTS/projector holds the tensors below denoise_tower.denoise_projector of UniWorld's checkpoint. The last command is
the same run, shrunk to a laptop.

The token loop keeps all of the captioner on a chip: 15 GB in bfloat16, over `tensor`. Its 4 key heads make tensor=4 the
most that also splits the cache; 16 GB chips take it. A batch is split along images first, then along the 8 captions of
each, which in the decoder the tensor axis splits too:

    | topology               | chips | mesh                            | data.batch_size | rl.rollout_microbatches |
    | v5e:4x4                |    16 | fsdp=-1 tensor=4                |               8 |                       2 |
    | v5e:8x8                |    64 | fsdp=-1 tensor=4                |              16 |                       1 |
    | v5e:16x16              |   256 | fsdp=64 tensor=4                |              64 |                       1 |
    | v6e:8x8                |    64 | fsdp=-1 tensor=2                |              32 |                       1 |
    | v6e:16x16              |   256 | data=2 fsdp=64 tensor=2         |              64 |                       1 |
    | v5p:4x4x4              |    64 | fsdp=-1                         |              64 |                       1 |
    | v5p:8x8x8              |   512 | data=8 fsdp=64                  |             128 |                       1 |
    | v5p:8x8x16             |  1024 | data=8 fsdp=128                 |             128 |                       1 |
    | v5e:16x16, 2..4 slices |  256k | slice=k fsdp=64 tensor=4        |             64k |                       1 |
    | 1 H100 or H200         |     1 | fsdp=-1                         |               1 |                       1 |
    | 8 H100 or H200         |     8 | fsdp=-1                         |               8 |                       1 |

Not yet run at this size.
"""

from ml_collections import ConfigDict

from configs import local, qwen2_5_vl_7b, uae_qwen2_5_vl_3b_sd3_5_large

# Fields of the hub's config.json of FLUX.1-dev's parts.
TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
VAE = uae_qwen2_5_vl_3b_sd3_5_large.VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def get_config(size: str = "") -> ConfigDict:
    """Captioner, prompts and adapters are those of configs/qwen2_5_vl_7b.py.

    Args:
      size: "runlocal" for a laptop.
    """
    config = qwen2_5_vl_7b.get_config()
    config.unlock()
    config.models.projector = ConfigDict({"architectures": ["Projector"], "kind": "uniworld"})
    config.models.transformer = ConfigDict(TRANSFORMER)
    config.models.vae = ConfigDict(VAE)
    config.models.clip = ConfigDict(uae_qwen2_5_vl_3b_sd3_5_large.CLIP)
    config.weights = "weights/uniworld_v1"
    config.mask_text = False
    config.redraw.steps = 28  # as its authors sample
    config.redraw.guidance = 1.0  # FLUX.1-dev is told its scale instead
    config.redraw.distilled_guidance = 3.5
    config.redraw.slice_vae = True
    config.data.batch_size = config.eval.batch_size = 64
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return local.shrunk(config) if size == "runlocal" else config.lock()
