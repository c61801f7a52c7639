"""Long-caption pretraining of UAE's decoder: Qwen2.5-VL-3B's states through the projector into SD3.5, flow matching.

python -m uae_jax.convert import Qwen2.5-VL-3B-Instruct WEIGHTS/captioner
python -m uae_jax.convert import stable-diffusion-3.5-large WEIGHTS
python -m uae_jax.main --config=configs/sd3_5_decoder.py --config.weights=WEIGHTS --config.data.path=PAIRS.jsonl
python -m uae_jax.main --config=configs/sd3_5_decoder.py --config.weights=runs/sd3_5_decoder/weights \\
    --config.data.path=PAIRS.jsonl --config.decoder.trainable='(projector|transformer)/.*' \\
    --config.decoder.optimizer.learning_rate=1e-5 --workdir=runs/sd3_5_decoder_both

WEIGHTS/projector holds the projector to start from. Not yet run at this size.
"""

from ml_collections import ConfigDict

from configs import qwen2_5_vl_3b
from uae_jax import config as base


def get_config() -> ConfigDict:
    """Prompts and models are those of configs/qwen2_5_vl_3b.py."""
    config = qwen2_5_vl_3b.get_config()
    config.unlock()
    config.stage = "decoder"
    config.weights = "weights/sd3_5"
    config.data.source = "jsonl"
    config.data.path = "pairs.jsonl"
    config.data.image_size = 512
    config.mask_text = False  # as the released UAE
    config.redraw.spacing = "diffusers"
    config.eval.enabled = False
    config.decoder = base.decoder()
    config.decoder.optimizer.learning_rate = 1e-3  # of the projector alone
    return config.lock()
