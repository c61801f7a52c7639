"""What `:runlocal` makes of a config of real size: the same run on a laptop, in a tiny world that ships."""

from typing import Any

from configs import tiny, tiny_ar


def shrunk(config: Any) -> Any:
    """`config` with a tiny world's weights, data, prompts and decoder, a few steps long; what it trains, and how the
    step is put together (adapters, microbatches, guidance, rewards of the text), stays."""
    small = (tiny_ar if "janus" in config.models else tiny).get_config()
    config.unlock()
    del config.models
    for field in ("weights", "towers", "dtype", "prompt", "data", "reward", "monitor", "mask_text", "eval", "mesh"):
        config[field] = small[field]
    for field in ("steps", "shift", "spacing", "prediction", "slice_vae"):
        config.redraw[field] = small.redraw[field]
    config.steps = 3
    config.data.batch_size = 4
    config.data.held_out = config.eval.batch_size = 16
    config.rl.group_size = 4
    config.rl.max_tokens = small.rl.max_tokens
    config.rl.microbatches = config.rl.rollout_microbatches = 2
    config.lora.rank = min(config.lora.rank, 4)
    return config.lock()
