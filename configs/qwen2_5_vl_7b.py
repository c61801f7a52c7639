"""As configs/qwen2_5_vl_3b.py, with Qwen2.5-VL-7B (UniWorld-V1's encoder).

python -m uae_jax.main --config=configs/qwen2_5_vl_7b.py --config.weights=WEIGHTS --config.data.path=IMAGES

Memory: 17 GB of weights in bfloat16, split over `mesh.fsdp`; the token loop reads a whole copy a chip, which a chip of
16 GB cannot hold.
"""

import copy

from ml_collections import ConfigDict

from configs import qwen2_5_vl_3b

# Fields of the hub's config.json of Qwen2.5-VL-7B-Instruct.
CAPTIONER = copy.deepcopy(qwen2_5_vl_3b.CAPTIONER) | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
CAPTIONER["vision_config"]["out_hidden_size"] = 3584


def get_config() -> ConfigDict:
    """Everything but the sizes and the folder is the 3B's."""
    config = qwen2_5_vl_3b.get_config()
    config.unlock()
    config.models = ConfigDict({"captioner": CAPTIONER})
    config.weights = "weights/qwen2_5_vl_7b"
    return config.lock()
