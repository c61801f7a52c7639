"""Cold start of the tiny autoregressive world: the image tokenizer, from nothing.

python -m uae_jax.main --config=configs/tiny_ar_coldstart.py [--config.stage=tokenizer] [--workdir=DIR]
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """The stages one after the other; each resumes where it stopped, and can be run alone."""
    config = base.default()
    config.unlock()
    config.stage = "tokenizer"

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

    config.tokenizer = ConfigDict()
    config.tokenizer.steps = 3000
    config.tokenizer.batch_size = 16
    config.tokenizer.object_weight = 4.0  # of errors on objects, against the background's 1
    config.tokenizer.absolute = 0.2  # weight of absolute errors beside the squared ones, which alone leave edges soft
    config.tokenizer.commitment = 0.25  # weight of the pull of latents to their codes, against that of codes to latents
    config.tokenizer.optimizer = base.optimizer("adamw", 2e-3, warmup=50, decay=True)
    return config.lock()
