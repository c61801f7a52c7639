"""Unified-GRPO on the paper's UAE: Qwen2.5-VL-3B writes, SD3.5-Large draws, CLIP L/14 rewards; adapters are trained.

python -m uae_jax.convert import Qwen2.5-VL-3B-Instruct WEIGHTS/captioner
python -m uae_jax.convert import stable-diffusion-3.5-large WEIGHTS
python -m uae_jax.convert import clip-vit-large-patch14 WEIGHTS/clip
python -m uae_jax.main --config=configs/uae_qwen2_5_vl_3b_sd3_5_large.py --config.weights=WEIGHTS \\
    --config.data.path=IMAGES --config.mesh.fsdp=-1 --config.mesh.tensor=2 --config.data.batch_size=32
python -m uae_jax.main --config=configs/uae_qwen2_5_vl_3b_sd3_5_large.py:runlocal

WEIGHTS/projector holds the projector of configs/sd3_5_decoder.py. The last command is the same run on a laptop.

The token loop keeps all of the captioner on a chip (7 GB in bfloat16, over `tensor`), the decoder is gathered layer by
layer. So 16 GB chips take tensor=2, as many as there are key heads, and larger ones none. A batch is split along images
first, then along the 8 captions of each:

    | topology               | chips | mesh                        | data.batch_size | rl.rollout_microbatches |
    | v5e:4x4                |    16 | fsdp=-1 tensor=2            |              16 |                       2 |
    | v5e:8x8                |    64 | fsdp=-1 tensor=2            |              32 |                       1 |
    | v5e:16x16              |   256 | data=2 fsdp=64 tensor=2     |              64 |                       1 |
    | v6e:8x8                |    64 | fsdp=-1                     |              64 |                       1 |
    | v6e:16x16              |   256 | data=4 fsdp=64              |             128 |                       1 |
    | v5p:4x4x4              |    64 | fsdp=-1                     |              64 |                       1 |
    | v5p:8x8x8              |   512 | data=8 fsdp=64              |             128 |                       1 |
    | v5p:8x8x16             |  1024 | data=8 fsdp=128             |             128 |                       1 |
    | v5e:16x16, 2..4 slices |  256k | slice=k data=2 fsdp=64 tensor=2 |           64k |                       1 |
    | 1 H100 or H200         |     1 | fsdp=-1                     |               2 |                       2 |
    | 8 H100 or H200         |     8 | fsdp=-1                     |              16 |                       2 |

Not yet run at this size.
"""

from ml_collections import ConfigDict

from configs import local, qwen2_5_vl_3b

# Fields of the hub's config.json of each part.
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
    "qk_norm": "rms_norm",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    },
    "vision_config": {
        "image_size": 224,
        "patch_size": 14,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def get_config(size: str = "") -> ConfigDict:
    """Captioner, prompts and adapters are those of configs/qwen2_5_vl_3b.py.

    Args:
      size: "runlocal" for a laptop.
    """
    config = qwen2_5_vl_3b.get_config()
    config.unlock()
    config.models.projector = ConfigDict({"architectures": ["Projector"], "kind": "uae"})
    config.models.transformer = ConfigDict(TRANSFORMER)
    config.models.vae = ConfigDict(VAE)
    config.models.clip = ConfigDict(CLIP)
    config.weights = "weights/uae"
    config.mask_text = False  # as the released UAE
    config.redraw.spacing = "diffusers"
    config.redraw.slice_vae = True
    config.data.batch_size = config.eval.batch_size = 64
    config.rl.microbatches = 1
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return local.shrunk(config) if size == "runlocal" else config.lock()
