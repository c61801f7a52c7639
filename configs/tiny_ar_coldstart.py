"""Cold start of the tiny autoregressive world: image tokenizer, then captions and image tokens, from nothing.

python -m uae_jax.main --config=configs/tiny_ar_coldstart.py [--config.stage=joint] [--workdir=DIR]

Hardware: two CPU cores. Time: 80 minutes (tokenizer 28, joint 52) on cores that also did much other work.
Expected, seed 0, on 256 held-out scenes: ceiling 0.941, reward of the model's own terse captions 0.231, forced-choice
perception 0.992, captions 9.2 tokens where complete ones have 21.7. Writes DIR/weights/janus with a card; towers and
judge are the shipped ones of the other world.
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """The stages one after the other; each resumes where it stopped, and can be run alone."""
    config = base.default()
    config.unlock()
    config.stage = "tokenizer,joint"
    config.remat = "none"  # memory is no concern at this size
    config.towers = "tiny"  # both worlds are measured alike
    config.prompt.redraw_suffix = "<|vision_start|>"  # begins an image
    config.redraw.temperature = 0.5  # of the pictures by which the card reckons; learning is at 1
    config.eval.every = 250

    # Fields of each model's config.json; shapes, names and forward passes are the real architectures'.
    config.models = ConfigDict()
    config.models.tokenizer = ConfigDict(
        {
            "architectures": ["JanusVQVAE"],
            "model_type": "janus_vqgan",
            "embed_dim": 8,
            "num_embeddings": 512,
            "latent_channels": 64,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2, 2],
            "num_res_blocks": 1,
            "num_patches": 6,
            "projection_dim": 128,
            "image_token_embed_dim": 128,
        }
    )
    config.models.janus = ConfigDict(
        {
            "architectures": ["JanusForConditionalGeneration"],
            "model_type": "janus",
            "tie_word_embeddings": False,
            "image_token_id": 5,
            "boi_token_id": 3,
            "eoi_token_id": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "text_config": {
                "model_type": "llama",
                "vocab_size": 37,
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "mlp_ratio": 2.0,
                "image_size": 48,
                "patch_size": 8,
                "projection_dim": 128,
                "depth": 2,
                "num_image_tokens": 36,
            },
        }
    )
    config.models.janus.vq_config = config.models.tokenizer

    config.tokenizer = ConfigDict()
    config.tokenizer.steps = 3000
    config.tokenizer.batch_size = 16
    config.tokenizer.object_weight = 4.0  # of errors on objects, against the background's 1
    config.tokenizer.absolute = 0.2  # weight of absolute errors beside the squared ones, which alone leave edges soft
    config.tokenizer.commitment = 0.25  # weight of the pull of latents to their codes, against that of codes to latents
    config.tokenizer.optimizer = base.optimizer("adamw", 2e-3, warmup=50, decay=True)

    config.joint = ConfigDict()
    config.joint.see_steps = 2200  # captions are complete
    config.joint.terse_steps = 300  # captions are mostly short
    config.joint.terse_learning_rate = 2e-3  # where the rate's cosine ends; from there it falls to 0
    config.joint.terse_keeps_complete = 0.1  # share of complete captions in the terse phase
    config.joint.terse_detail = 0.2  # probability of each attribute in the others
    config.joint.curriculum_steps = 300  # up to one object at first, up to four from here on
    config.joint.complete = 0.5  # share of complete captions among those that are drawn; the rest is of any length
    config.joint.dropout = 0.1  # share of those that are hidden, for guidance
    config.joint.image_weight = 1.0  # of the image tokens' loss, against the caption's 1
    config.joint.batch_size = 48
    config.joint.optimizer = base.optimizer("muon", 1e-2, warmup=30)
    return config.lock()
