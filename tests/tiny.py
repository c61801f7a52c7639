"""A tiny random system for tests: the shapes of the cold start with fewer layers, untrained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny, tiny_ar_coldstart, tiny_coldstart
from uae_jax import runtime
from uae_jax.convert import folder
from uae_jax.data.shapes import tokenizer
from uae_jax.data.sources import ShapesSource
from uae_jax.models import initial
from uae_jax.models.cell_classifier.model import CellClassifier
from uae_jax.models.clip.model import CLIP
from uae_jax.models.janus.model import Janus
from uae_jax.models.projector.model import Projector
from uae_jax.models.qwen2_5_vl.model import Qwen2_5_VL
from uae_jax.models.sd3.model import SD3Transformer
from uae_jax.stages.captioner import initial_captioner
from uae_jax.stages.coldstart import model_config


def louder(params, scale=2.0):
    """Scales embeddings and heads, so that an untrained captioner is far from uniform and images matter."""
    params["language"] = jax.tree.map(lambda x: x * scale if x.ndim > 1 else x, params["language"])
    return params


def coldstart_config(**changes):
    """The cold start at test size: fewer layers, two steps a stage."""
    c = tiny_coldstart.get_config()
    c.unlock()
    c.models.captioner.num_hidden_layers = 2
    c.models.captioner.vision_config.depth = 2
    c.models.captioner.vision_config.fullatt_block_indexes = [1]
    c.models.transformer.num_layers = 2
    c.models.clip.text_config.num_hidden_layers = 1
    c.models.clip.vision_config.num_hidden_layers = 1
    c.models.dinov2.num_hidden_layers = 1
    c.models.siglip.vision_config.num_hidden_layers = c.models.siglip.text_config.num_hidden_layers = 1
    c.tower.steps = c.bench_tower.steps = c.decoder.steps = c.captioner.see_steps = 2
    c.captioner.terse_steps = 1
    c.tower.batch_size = c.bench_tower.batch_size = c.captioner.batch_size = c.decoder.batch_size = 4
    c.data.held_out = c.eval.batch_size = 4
    return changed(c, changes)


def changed(c, changes):
    """A config with `changes`, dotted fields with '__' for dots, locked."""
    for name, value in changes.items():
        node = c
        *parents, leaf = name.split("__")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return c.lock()


def write_weights(target: Path, seed: int = 0) -> Path:
    """Writes captioner, projector, transformer, two towers and a judge; returns the folder."""
    config = coldstart_config()
    keys = jax.random.split(jax.random.key(seed), 8)
    size = config.data.image_size
    image = jnp.zeros((1, size, size, 3))

    captioner = Qwen2_5_VL(model_config(config, "captioner"))
    params = louder(initial_captioner(keys[0], captioner, size))
    folder.save_model(target / "captioner", captioner.config, params)
    tokenizer.build().save(str(target / "captioner" / "tokenizer.json"))

    projector = Projector(model_config(config, "projector"))
    states = jnp.zeros((1, projector.config.in_size))
    folder.save_model(target / "projector", projector.config, initial(projector, keys[1], states))

    transformer = SD3Transformer(model_config(config, "transformer"))
    text = jnp.zeros((1, 1, transformer.config.joint_attention_dim))
    pooled = jnp.zeros((1, transformer.config.pooled_projection_dim))
    params = initial(transformer, keys[2], image, text, pooled, jnp.zeros(1))
    folder.save_model(target / "transformer", transformer.config, params)

    clip = CLIP(model_config(config, "clip"))
    for name, key in (("clip", keys[3]), ("clip_second", keys[4])):
        params = initial(clip, key, image, jnp.zeros((1, 4), int))
        folder.save_model(target / name, clip.config, params)
    judge = CellClassifier(model_config(config, "judge"))
    folder.save_model(target / "judge", judge.config, initial(judge, keys[5], image))
    return target


def ar_coldstart_config(**changes):
    """The cold start of the autoregressive world at test size."""
    c = tiny_ar_coldstart.get_config()
    c.unlock()
    c.models.janus.text_config.num_hidden_layers = 2
    c.models.janus.vision_config.num_hidden_layers = 1
    c.models.tokenizer.channel_multiplier = [1, 1, 1, 1]
    c.models.tokenizer.num_embeddings = 32
    c.models.tokenizer.latent_channels = 32
    c.tokenizer.steps = c.joint.see_steps = 2
    c.joint.terse_steps = 1
    c.joint.batch_size = c.tokenizer.batch_size = 4
    c.data.held_out = c.eval.batch_size = 4
    return changed(c, changes)


CODES = 36  # of an image of `write_janus`


def write_janus(target: Path, seed: int = 0) -> Path:
    """Writes an untrained model that captions and draws, as janus/; returns the folder."""
    model = Janus(model_config(ar_coldstart_config(), "janus"))
    size, c = model.config.vision.image_size, model.config
    tokens = jnp.full((1, c.vision.num_patches), c.image_token_id)
    params = initial(model, jax.random.key(seed), jnp.zeros((1, size, size, 3)), tokens)
    params = louder(params)
    params["gen_head"]["vision_head"] = jax.tree.map(lambda x: 3 * x, params["gen_head"]["vision_head"])
    folder.save_model(target / "janus", c, params)
    tokenizer.build().save(str(target / "janus" / "tokenizer.json"))
    return target


def ar_config(weights: Path, towers: Path, **changes):
    """The tiny run of the autoregressive family at test size, towers and judge being those of another folder."""
    suffix = tiny_ar_coldstart.get_config().prompt.redraw_suffix
    return config(weights, towers=str(towers), prompt__redraw_suffix=suffix, **changes)


def config(weights: Path, **changes):
    """The tiny run at test size; `changes` are dotted fields with '__' for dots."""
    c = tiny.get_config()
    c.unlock()
    c.weights = str(weights)
    c.steps = 3
    c.data.batch_size = 2
    c.data.held_out = 4
    c.rl.group_size = 4
    c.rl.max_tokens = 8
    c.rl.malformed = "keep"  # all that an untrained captioner writes is malformed
    c.eval.enabled = False
    c.optimizer.warmup = 0
    return changed(c, changes)


def flat(c) -> dict:
    """A config's fields under dotted names."""
    return {name: value for name, value in runtime.flatten(c.to_dict()).items() if not isinstance(value, dict)}


def default_fields() -> dict:
    """The fields of configs/tiny.py."""
    return flat(tiny.get_config())


def scenes(n: int, seed: int = 0) -> np.ndarray:
    """Rendered images uint8 [n, 48, 48, 3]."""
    source = ShapesSource(seed, n)
    return np.stack([source[i]["image"] for i in range(n)])
