"""Draws pictures of prompts: by a system's captioner, projector and decoder, or by a decoder's own text towers.

What is written has GenEval's layout: `{index:05}/metadata.jsonl`, the prompt's line, beside
`{index:05}/samples/{sample:05}.png`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import pictures, sharding, storage, system
from uae_jax.convert import folder, pooled
from uae_jax.data.text import encode_captions
from uae_jax.errors import UserError
from uae_jax.models.clip.model import CLIPText
from uae_jax.models.flux import config as flux_config
from uae_jax.models.t5.model import T5Encoder
from uae_jax.models.vae.model import AutoencoderKL
from uae_jax.sampling import scheduler
from uae_jax.sampling.tokens import Segment
from uae_jax.step import sample_keys
from uae_jax.umm import Params, decoder, host

Draw = Callable[[list[str], jax.Array], np.ndarray]  # (prompts [b], keys [b, g]) -> images [b, g, H, W, 3] in 0..1


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file: a line each, or with the ending .jsonl an object with "prompt" each.

    Raises:
      UserError: the file cannot be read or is empty, or a line (named by its number) is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--from_text: {path} cannot be read ({error}): name a file of prompts, a line each") from None
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append({"prompt": line.strip()})
            continue
        try:
            values = json.loads(line)
            if not isinstance(values["prompt"], str):
                raise TypeError("it is no string")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": text, ...}} ({type(error).__name__}: {error})'
            ) from None
        found.append(values)
    if not found:
        raise UserError(f"{path} holds no prompts")
    return found


def by_system(
    config: Any, built: system.System, params: Params, mesh: jax.sharding.Mesh, longest: Sequence[str]
) -> Draw:
    """Draws as the loop does: the text encoder's states of a prompt through the projector.

    Args:
      config: its redraw.same_noise is False, or all samples of a prompt are one.
      longest: all prompts: the longest makes room for itself.

    Raises:
      UserError: this system draws only what it has written with a picture in view.
    """
    if config.condition_source != "text":
        raise UserError(
            "--from_text: config.condition_source = 'in_context' conditions on a picture, here there is none"
        )
    family = built.family(config)
    most = max(len(encoding.ids) for encoding in built.tokenizer.encode_batch(list(longest), add_special_tokens=False))
    length = max(config.rl.max_tokens, most + 1)
    size = config.data.image_size

    @jax.jit
    def run(params: Params, frozen: Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array) -> jax.Array:
        shape = (*keys.shape, length)
        tokens, mask = (jnp.broadcast_to(x[:, None], shape) for x in (tokens, mask))
        unseen = jnp.zeros((len(keys), size, size, 3))
        return family.redraw(params, frozen, Segment(tokens, mask, jnp.zeros(shape)), unseen, keys)[0]

    def draw(prompts: list[str], keys: jax.Array) -> np.ndarray:
        tokens, mask = encode_captions(built.tokenizer, prompts, length, built.prompts.end_token)
        batch = sharding.place_batch({"tokens": tokens, "mask": mask}, mesh)
        return jax.device_get(run(params, built.frozen, batch["tokens"], batch["mask"], keys))

    return draw


def load_host(pipeline: Path, config: Any, mesh: jax.sharding.Mesh) -> tuple[host.Host, Params, dict[str, Any]]:
    """A diffusers pipeline's networks, its parameters on the mesh, and its tokenizers by their tower's folder.

    Raises:
      UserError: a part is missing or is of another kind, or the parts do not fit each other.
    """
    import transformers

    kind = folder.architecture(folder.load_config(pipeline / "transformer"))
    if kind not in pooled.TOWERS:
        raise UserError(f"{pipeline / 'transformer'} is a {kind}, not one of {', '.join(pooled.TOWERS)}")
    dtype = jnp.dtype(config.dtype)
    t5, t5_tokenizer, _ = host.T5[kind]
    towers = dict(pooled.TOWERS[kind])
    if (pipeline / t5).is_dir() or kind == flux_config.CLASS_NAME:
        towers[t5] = t5_tokenizer
    names = [*towers, "transformer", "vae"]
    models = {name: folder.load_model(pipeline / name, mesh, dtype) for name in names}
    tokenizers = {}
    for name, where in towers.items():
        try:
            tokenizers[name] = transformers.AutoTokenizer.from_pretrained(pipeline / where)
        except (OSError, ValueError) as error:
            raise UserError(f"{pipeline / where} is no tokenizer: {str(error).splitlines()[0]}") from None
    clips = [(name, models[name].config) for name, _ in pooled.TOWERS[kind]]
    for name, clip in clips:
        if not hasattr(clip, "text"):
            raise UserError(f"{pipeline / name} is not a CLIP text tower, which {kind} reads")
    found = host.Host(
        tuple((name, CLIPText(clip, dtype)) for name, clip in clips),
        T5Encoder(models[t5].config, dtype) if t5 in models else None,
        decoder.transformer(models["transformer"].config, dtype),
        AutoencoderKL(models["vae"].config, dtype),
        scheduler.load(pipeline / "scheduler"),
    )
    reads = found.transformer.config
    widths = {
        "pooled": (sum(c.projection_dim or c.text.hidden_size for _, c in clips), reads.pooled_projection_dim),
        "T5": (models[t5].config.d_model if found.t5 else reads.joint_attention_dim, reads.joint_attention_dim),
        "latent": (found.vae.config.latent_channels, decoder.channels(found.transformer)),
    }
    wrong = [
        f"{name} channels: {has}, the transformer reads {wants}"
        for name, (has, wants) in widths.items()
        if has != wants
    ]
    if not found.flux and sum(c.text.hidden_size for _, c in clips) > reads.joint_attention_dim:
        wrong.append(f"CLIP channels: more than the {reads.joint_attention_dim} that the transformer reads")
    if wrong:
        raise UserError(f"{pipeline}: its parts are not of one pipeline: {'; '.join(wrong)}")
    return found, {name: model.params for name, model in models.items()}, tokenizers


def tokens(found: host.Host, tokenizers: dict[str, Any], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Ids int32 [n, t] of prompts for every tower, padded and cut to what the pipeline hands it."""
    t5, _, t5_length = host.T5[found.kind]
    lengths = {name: tower.config.text.max_position_embeddings for name, tower in found.clips}
    if found.t5 is not None:
        lengths[t5] = t5_length
    return {
        name: np.asarray(
            tokenizers[name](list(prompts), padding="max_length", max_length=length, truncation=True).input_ids,
            np.int32,
        )
        for name, length in lengths.items()
    }


def by_host(config: Any, pipeline: Path, mesh: jax.sharding.Mesh) -> Draw:
    """Draws as a diffusers pipeline does, with the steps, guidance and image size of `config`; see `load_host`."""
    found, params, tokenizers = load_host(pipeline, config, mesh)
    size = config.data.image_size
    shape = decoder.latent_shape(found.transformer, found.vae, size, size)
    decoder.check_tile(found.vae, config.redraw.tile_vae)
    negative = {name: ids[0] for name, ids in tokens(found, tokenizers, [""]).items()}

    @jax.jit
    def run(params: Params, ids: host.Tokens, keys: jax.Array) -> jax.Array:
        noise = decoder.initial_noise(keys, shape, same=False)
        drawn = host.latents(found, params, ids, negative, noise, config.redraw)
        pieces = config.redraw.slice_vae, config.redraw.tile_vae
        return decoder.pixels_from_latents(drawn, found.vae, params["vae"], *pieces, mesh)

    def draw(prompts: list[str], keys: jax.Array) -> np.ndarray:
        return jax.device_get(run(params, sharding.place_batch(tokens(found, tokenizers, prompts), mesh), keys))

    return draw


def write(draw: Draw, prompts: list[dict[str, Any]], out: Path, samples: int, batch: int, seed: int) -> None:
    """Draws `samples` pictures of each prompt, `batch` prompts at a time, into `out` in GenEval's layout.

    A picture depends on its prompt's place in the file, its own number and the seed alone.
    """
    count = -(-len(prompts) // batch) * batch
    keys = sample_keys(jax.random.key(seed), jnp.int32(0), count, samples)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = [values["prompt"] for values in part]
        texts += texts[-1:] * (batch - len(texts))
        images = draw(texts, keys[start : start + batch])
        for i, (values, group) in enumerate(zip(part, images, strict=False), start):
            place = out / f"{i:05}"
            with storage.storage_errors(place):
                (place / "samples").mkdir(parents=True, exist_ok=True)
                (place / "metadata.jsonl").write_text(json.dumps(values) + "\n")
                for k, image in enumerate(group):
                    pictures.save_png(place / "samples" / f"{k:05}.png", pictures.to_uint8(image))
