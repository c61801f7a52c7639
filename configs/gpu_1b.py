"""What `benchmarks/gpu.py` runs: a captioner of 1.5B, SD3.5-medium and CLIP L/14 in bfloat16, with random weights.

python -m benchmarks.gpu --out=gpu.json

Hardware: one GPU of 80 GB. Time: some minutes, most of them compilation. Expected: nothing is learnt; the figures are
the result. Not yet run on a GPU.
"""

from ml_collections import ConfigDict

from configs import uae_qwen2_5_vl_3b_sd3_5_large as uae

# Qwen2.5-1.5B's sizes, behind the 3B's vision tower.
CAPTIONER = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
# SD3.5-medium's, where they differ from the large one's.
TRANSFORMER = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}


def get_config() -> ConfigDict:
    """All but the sizes and the batch is that of configs/uae_qwen2_5_vl_3b_sd3_5_large.py."""
    config = uae.get_config()
    config.unlock()
    config.models.captioner.update(CAPTIONER)
    config.models.captioner.vision_config.out_hidden_size = CAPTIONER["hidden_size"]
    config.models.projector.in_size = CAPTIONER["hidden_size"]
    config.models.transformer.update(TRANSFORMER)
    config.data.batch_size = config.eval.batch_size = 8
    config.rl.group_size = 4
    config.redraw.slice_vae = False
    return config.lock()
