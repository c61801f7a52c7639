"""Unified-GRPO with Janus-Pro-1B: one language model writes the caption and draws it as 576 image tokens.

python -m uae_jax.convert import Janus-Pro-1B WEIGHTS/janus
python -m uae_jax.main --config=configs/janus_pro_1b.py --config.weights=WEIGHTS --config.data.path=IMAGES
python -m uae_jax.main --config=configs/janus_pro_1b.py:runlocal

The folder that is imported is deepseek-community's (transformers' layout) or deepseek-ai's own, whose .bin is refused
with the command that turns it into safetensors. WEIGHTS also holds the reward's tower (clip/). Whatever sizes its
folders have are used; `config.models` states those of the 1B, to plan without weights. The last command is the same
run on a laptop, with the weights of configs/tiny_ar.py.

Hardware: memory a chip, as compiled for the first row below: 0.3 GiB of weights, 5.8 at the peak of writing captions,
8.2 at that of drawing them with guidance, 12.8 in the update, of 15.8. A batch is split along images first,
then along the 8 captions of each:

    | topology               | chips | mesh                   | data.batch_size | rl.rollout_microbatches |
    | v5e:4x4                |    16 | fsdp=-1                |              16 |                       1 |
    | v5e:16x16              |   256 | data=4 fsdp=64         |             128 |                       1 |
    | v6e:16x16              |   256 | data=4 fsdp=64         |             128 |                       1 |
    | v5p:4x4x4              |    64 | fsdp=-1                |              64 |                       1 |
    | v5p:8x8x16             |  1024 | data=8 fsdp=128        |             128 |                       1 |
    | v5e:16x16, 2..4 slices |  256k | slice=k data=4 fsdp=64 |             64k |                       1 |
    | 1 H100 or H200         |     1 | fsdp=-1                |               4 |                       2 |
    | 8 H100 or H200         |     8 | fsdp=-1                |              16 |                       1 |

Not yet run at this size: neither wall time nor the reward to expect has been measured.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import local
from configs.qwen2_5_vl_3b import REQUEST
from configs.uae_qwen2_5_vl_3b_sd3_5_large import CLIP
from uae_jax import config as base


def model(width: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """Fields of a Janus-Pro's config.json, by the sizes of its language model."""
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "image_token_id": 100581,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 102400,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 16384,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "pad_token_id": 100015,
        },
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 16,
            "mlp_ratio": 4.0,
            "layer_norm_eps": 1e-6,
            "depth": 2,
            "projection_dim": width,
            "num_image_tokens": 576,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": 8,
            "num_embeddings": 16384,
            "latent_channels": 256,
            "base_channels": 128,
            "channel_multiplier": [1, 1, 2, 2, 4],
            "num_res_blocks": 2,
            "num_patches": 24,
            "num_hidden_layers": 2,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
    }


# What deepseek-ai's VLChatProcessor (conversation template "deepseek") puts round a question about an image, and its
# generation_inference.py round a text to draw, to the letter and with the first token that its tokenizer adds.
BEGIN = "<｜begin▁of▁sentence｜>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
IMAGE = "<begin_of_image><image_placeholder><end_of_image>"  # the placeholder stands for all 576 features
CAPTION = f"{BEGIN}{SYSTEM}\n\n<|User|>: {IMAGE}\n{REQUEST}\n\n<|Assistant|>:"
# No space at the end: a caption that was sampled after "<|Assistant|>:" begins with one.
REDRAW_PREFIX = f"{BEGIN}<|User|>:"
REDRAW_SUFFIX = "\n\n<|Assistant|>:<begin_of_image>"


def get_config(size: str = "") -> ConfigDict:
    """Everything not named here is `uae_jax.config.default`.

    Args:
      size: "runlocal" for a laptop.
    """
    config = base.default()
    config.unlock()
    config.models = ConfigDict({"janus": model(width=2048, intermediate=5632, layers=24, heads=16), "clip": CLIP})
    config.weights = "weights/janus_pro_1b"
    config.dtype = "bfloat16"

    config.train = "both"  # captions and image tokens
    config.text_encoder = "live"
    config.lora.rank = 64  # 0 trains `trainable` in full; the learning rate is then to be 1e-6 or so
    config.lora.alpha = 64.0
    config.optimizer = base.optimizer("adamw", 2e-5, warmup=10)

    config.prompt.caption = CAPTION
    config.prompt.redraw_prefix = REDRAW_PREFIX
    config.prompt.redraw_suffix = REDRAW_SUFFIX

    config.rl.group_size = 8
    config.rl.max_tokens = 256
    config.redraw.guidance = 5.0  # as the original samples, at temperature 1
    config.redraw.same_noise = False

    config.data.source = "folder"
    config.data.path = "images"
    config.data.image_size = 384
    config.data.batch_size = 16
    config.eval.batch_size = 16
    config.monitor = ()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return local.shrunk(config) if size == "runlocal" else config.lock()
