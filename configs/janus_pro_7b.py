"""As configs/janus_pro_1b.py, with Janus-Pro-7B.

python -m uae_jax.convert import Janus-Pro-7B WEIGHTS/janus
python -m uae_jax.main --config=configs/janus_pro_7b.py --config.weights=WEIGHTS --config.data.path=IMAGES

Hardware: 15 GB of weights in bfloat16, split over `mesh.fsdp`; the token loop reads a whole copy a chip, which a chip
of 16 GB cannot hold. Not yet run at this size: neither wall time nor the reward to expect has been measured.
"""

from ml_collections import ConfigDict

from configs import janus_pro_1b


def get_config() -> ConfigDict:
    """Everything but the sizes and the folder is the 1B's."""
    config = janus_pro_1b.get_config()
    config.unlock()
    config.models.janus = ConfigDict(janus_pro_1b.model(width=4096, intermediate=11008, layers=30, heads=32))
    config.weights = "weights/janus_pro_7b"
    return config.lock()
