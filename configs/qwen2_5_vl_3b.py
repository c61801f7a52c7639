"""Unified-GRPO with the paper's encoder, Qwen2.5-VL-3B, by LoRA.

python -m uae_jax.convert import Qwen2.5-VL-3B-Instruct WEIGHTS/captioner
python -m uae_jax.main --config=configs/qwen2_5_vl_3b.py --config.weights=WEIGHTS --config.data.path=IMAGES

WEIGHTS also holds the decoder (projector/, and transformer/, vae/ and scheduler/ by `convert import` of a diffusers
pipeline) and the reward's tower (clip/). Whatever sizes its folders have are used; `config.models` states those of the
3B, to plan without weights. Memory a chip, as compiled for 16 of TPU v5e, an image and 4 captions of 128 tokens each,
without the decoder: 0.44 GiB of weights, 1.1 at the peak of training adapters, 7.8 at that of writing captions (the
token loop reads a whole copy). Not yet run at this size.
"""

from ml_collections import ConfigDict

from uae_jax import config as base

# Fields of the hub's config.json of Qwen2.5-VL-3B-Instruct.
CAPTIONER = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 2048,
    },
}


# The caption prompt and the negative prompt of the paper's released demo, to the letter.
REQUEST = (
    "You are an expert vision-language model. Your task is: Given an input image, generate a **textual description** "
    'of the image. If there is text in the image, transcribe it inside double quotes "". Now, carefully analyze the '
    "input image and output the full description."
)
NEGATIVE = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."


def get_config() -> ConfigDict:
    """Everything not named here is `uae_jax.config.default`."""
    config = base.default()
    config.unlock()
    config.models = ConfigDict({"captioner": CAPTIONER})
    config.weights = "weights/qwen2_5_vl_3b"
    config.dtype = "bfloat16"

    config.lora.rank = 64  # 0 trains `trainable` in full; the learning rate is then to be 1e-6 or so
    config.lora.alpha = 64.0
    config.optimizer = base.optimizer("adamw", 2e-5, warmup=10)

    # What the model's chat template makes of a user's request and image, and of a user's text.
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    config.prompt.caption = f"{system}{REQUEST}<|vision_start|><|image_pad|><|vision_end|>{answer}"
    config.prompt.redraw_prefix = system
    config.prompt.redraw_suffix = answer
    config.prompt.negative = NEGATIVE

    config.rl.group_size = 8
    config.rl.max_tokens = 256
    config.redraw.steps = 10  # as the paper's released reward
    config.redraw.guidance = 5.0
    config.redraw.shift = 3.0

    config.data.source = "folder"
    config.data.path = "images"
    config.data.image_size = 448  # 256 image tokens in the prompt
    config.data.batch_size = 16
    config.eval.batch_size = 16
    config.monitor = ()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config.lock()
