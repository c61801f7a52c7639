"""Cold start of the tiny world: towers, captioner, decoder, from nothing. Its weights are what the package ships.

python -m uae_jax.main --config=configs/tiny_coldstart.py [--config.stage=decoder] [--workdir=DIR]

Hardware: two CPU cores. Time: an hour (tower 12 minutes, captioner 7, decoder 40, on cores that also did other work).
Expected, seed 0, on 256 held-out scenes: ceiling 0.975, reward of the captioner's own terse captions 0.170,
forced-choice perception 0.996, captions 8.2 tokens where complete ones have 21.7. Writes DIR/weights with a card.
"""

from ml_collections import ConfigDict

from uae_jax import config as base


def get_config() -> ConfigDict:
    """The three stages one after the other; each resumes where it stopped, and can be run alone."""
    config = base.default()
    config.unlock()
    config.stage = "tower,bench_tower,captioner,decoder"
    config.remat = "none"  # memory is no concern at this size
    config.redraw.prediction = "sample"  # what the decoder learns to predict: the clean image
    config.redraw.steps = 2

    # Fields of each model's config.json; shapes, names and forward passes are the real architectures'.
    config.models = ConfigDict()
    config.models.captioner = ConfigDict(
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "vocab_size": 37,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "image_token_id": 5,
            "vision_start_token_id": 3,
            "vision_end_token_id": 4,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "vision_config": {
                "depth": 4,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_heads": 4,
                "in_channels": 3,
                "patch_size": 8,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
                "tokens_per_second": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1, 3],
                "out_hidden_size": 128,
            },
        }
    )
    config.models.transformer = ConfigDict(
        {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 48,
            "patch_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 5,
            "attention_head_dim": 32,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 6,
            "dual_attention_layers": [],
            "qk_norm": "rms_norm",
        }
    )
    config.models.projector = ConfigDict(
        {"architectures": ["Projector"], "in_size": 128, "hidden_size": 256, "out_size": 128, "whiten": True}
    )
    config.models.clip = ConfigDict(
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 64,
            "text_config": {
                "vocab_size": 37,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 32,
                "hidden_act": "quick_gelu",
                "eos_token_id": 2,
                "layer_norm_eps": 1e-5,
            },
            "vision_config": {
                "image_size": 48,
                "patch_size": 8,
                "hidden_size": 96,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "hidden_act": "quick_gelu",
                "layer_norm_eps": 1e-5,
            },
        }
    )
    config.models.dinov2 = ConfigDict(
        {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "image_size": 48,
            "patch_size": 8,
            "hidden_size": 96,
            "mlp_ratio": 3,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
        }
    )
    config.models.siglip = ConfigDict(
        {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "text_config": {
                "vocab_size": 37,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 32,
                "projection_size": 96,
            },
            "vision_config": {
                "image_size": 48,
                "patch_size": 8,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
            },
        }
    )
    config.models.judge = ConfigDict(
        {
            "architectures": ["CellClassifier"],
            "grid": 3,
            "channels": 32,
            "shapes": 7,
            "colours": 9,
            "sizes": 3,
            "backgrounds": 4,
        }
    )

    config.tower = ConfigDict()
    config.tower.steps = 900
    config.tower.batch_size = 128  # half of them differ from a neighbour in one attribute
    config.tower.optimizer = base.optimizer("muon", 5e-3, warmup=50, decay=True)

    config.bench_tower = ConfigDict()
    config.bench_tower.steps = 600
    config.bench_tower.batch_size = 48
    config.bench_tower.optimizer = base.optimizer("muon", 5e-3, warmup=50, decay=True)

    config.captioner = ConfigDict()
    config.captioner.see_steps = 1000  # on complete captions
    config.captioner.terse_steps = 225  # on mostly short ones
    config.captioner.terse_learning_rate = 2e-3  # falls to 0 over the terse phase
    config.captioner.terse_keeps_complete = 0.1  # share of complete captions in the terse phase
    config.captioner.terse_detail = 0.2  # probability of each attribute in the others
    config.captioner.curriculum_steps = 200  # up to one object at first, up to four from here on
    config.captioner.batch_size = 64
    config.captioner.optimizer = base.optimizer("muon", 1e-2, warmup=30)

    config.decoder = ConfigDict()
    config.decoder.steps = 4500
    config.decoder.batch_size = 48
    config.decoder.complete = 0.5  # share of complete captions; the rest is of any length
    config.decoder.curriculum_steps = 1000
    config.decoder.level_mean = 1.0  # noise levels are sigmoid(mean + std n): towards noise, where text decides
    config.decoder.level_std = 1.0
    config.decoder.object_weight = 2.0  # of squared errors on objects, against the background's 1
    config.decoder.optimizer = base.optimizer("muon", 6e-3, warmup=50, decay=True)
    return config.lock()
