"""As configs/janus_pro_1b.py, with Janus-Pro-7B.

python -m uae_jax.convert import Janus-Pro-7B WEIGHTS/janus
python -m uae_jax.main --config=configs/janus_pro_7b.py --config.weights=WEIGHTS --config.data.path=IMAGES
python -m uae_jax.main --config=configs/janus_pro_7b.py:runlocal

Hardware: the token loop keeps all of the model on a chip: 15 GB in bfloat16, over `tensor`, and 7 GB of keys and values
for an image with 8 captions and guidance. Compiled for the first row below it takes 15.6 of a chip's 15.8 GiB, in the
update:

    | topology               | chips | mesh                     | data.batch_size | rl.rollout_microbatches |
    | v5e:4x4                |    16 | fsdp=-1 tensor=4         |               8 |                       2 |
    | v5e:16x16              |   256 | fsdp=64 tensor=4         |              64 |                       1 |
    | v6e:16x16              |   256 | data=2 fsdp=64 tensor=2  |              64 |                       1 |
    | v5p:4x4x4              |    64 | fsdp=-1                  |              64 |                       1 |
    | v5p:8x8x16             |  1024 | data=8 fsdp=128          |             128 |                       1 |
    | v5e:16x16, 2..4 slices |  256k | slice=k fsdp=64 tensor=4 |             64k |                       1 |
    | 1 H100 or H200         |     1 | fsdp=-1                  |               1 |                       1 |
    | 8 H100 or H200         |     8 | fsdp=-1                  |               8 |                       1 |

Not yet run at this size: neither wall time nor the reward to expect has been measured.
"""

from ml_collections import ConfigDict

from configs import janus_pro_1b, local


def get_config(size: str = "") -> ConfigDict:
    """Everything but the sizes and the folder is the 1B's.

    Args:
      size: "runlocal" for a laptop.
    """
    config = janus_pro_1b.get_config()
    config.unlock()
    config.models.janus = ConfigDict(janus_pro_1b.model(width=4096, intermediate=11008, layers=30, heads=32))
    config.weights = "weights/janus_pro_7b"
    return local.shrunk(config) if size == "runlocal" else config.lock()
