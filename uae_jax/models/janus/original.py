"""Janus as deepseek-ai publishes it: `MultiModalityCausalLM`, by its `config.json` and its names of tensors.

The same parameters as `weights.table`'s under other names, with query, key and value of the vision tower in one matrix.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from uae_jax.convert.table import Entry, Names, Transform
from uae_jax.errors import UserError
from uae_jax.models.janus import weights
from uae_jax.models.janus.config import TOKENS, Config, VisionConfig, llama, supported
from uae_jax.models.janus.vq import VQConfig

MODEL_TYPE = "multi_modality"

# Its config.json names these networks, and does not say what they are.
TOWERS = {"siglip_large_patch16_384": VisionConfig()}
TOKENIZERS = {"VQ-16": VQConfig()}

# Query, key and value in one matrix [3 d, d] <-> [3, d (in), d (out)], and their biases [3 d] <-> [3, d]
_QKV = Transform(
    lambda x: x.reshape(3, -1, x.shape[-1]).transpose(0, 2, 1), lambda x, shape: x.transpose(0, 2, 1).reshape(shape)
)
_QKV_BIAS = Transform(lambda x: x.reshape(3, -1), lambda x, shape: x.reshape(shape))
# [1, n, d] <-> [n, d]
_POSITIONS = Transform(lambda x: x[0], lambda x, shape: x.reshape(shape))

# From transformers' names, in this order.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.vision_model\.encoder\.layers\.", "vision_model.vision_tower.blocks."),
        (r"^model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
        (r"^model\.vision_model\.embeddings\.position_embedding\.weight$", "vision_model.vision_tower.pos_embed"),
        (r"^model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
        (r"\.self_attn\.projection_layer\.", ".attn.proj."),
        (r"\.self_attn\.q_proj\.", ".attn.qkv."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"^model\.aligner\.", "aligner."),
        (r"^model\.generation_aligner\.", "gen_aligner."),
        (r"^model\.generation_embeddings\.", "gen_embed."),
        (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^model\.generation_head\.", "gen_head."),
        (r"^model\.vqmodel\.", "gen_vision_model."),
        (r"\.encoder\.down\.", ".encoder.conv_blocks."),
        (r"\.decoder\.up\.", ".decoder.conv_blocks."),
        (r"\.block\.(\d)", r".res.\1"),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
    )
]


def from_hf(values: Mapping[str, Any]) -> Config:
    """Parses deepseek-ai's `config.json` of a Janus or Janus-Pro.

    Raises:
      UserError: another architecture, a part that is not known, or parts that do not fit each other.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise UserError(f"config.json: model_type is {values.get('model_type')!r}, expected {MODEL_TYPE!r}")
    vision = _part(values, "vision", "CLIPVisionTower")
    aligner = _part(values, "aligner", "MlpProjector")
    codes = _part(values, "gen_vision", *TOKENIZERS)
    gen_aligner = _part(values, "gen_aligner", "MlpProjector")
    head = _part(values, "gen_head", "vision_head")
    language = values.get("language_config") or {}
    text = llama({**language, "tie_word_embeddings": bool(language.get("tie_word_embeddings"))}, "language_config.")

    name = vision.get("model_name", "")
    supported(name in TOWERS, "vision_config.params.model_name", name)
    tower = dataclasses.replace(TOWERS[name], image_size=vision.get("image_size", TOWERS[name].image_size))
    width, vq = text.hidden_size, TOKENIZERS[values["gen_vision_config"]["cls"]]
    for where, params, field, wanted in (
        ("vision", vision, "select_layer", -1),  # the last
        ("vision", vision, "pixel_mean", None),
        ("aligner", aligner, "projector_type", "mlp_gelu"),
        ("aligner", aligner, "input_dim", tower.hidden_size),
        ("aligner", aligner, "n_embed", width),
        ("gen_aligner", gen_aligner, "projector_type", "mlp_gelu"),
        ("gen_aligner", gen_aligner, "input_dim", vq.embed_dim),
        ("gen_aligner", gen_aligner, "n_embed", width),
        ("gen_head", head, "n_embed", width),
        ("gen_head", head, "image_token_embed", width),
        ("gen_head", head, "image_token_size", vq.num_embeddings),
        ("gen_vision", codes, "image_token_size", vq.num_embeddings),
        ("gen_vision", codes, "n_embed", vq.embed_dim),
    ):
        found = params.get(field)
        supported(found == wanted, f"{where}_config.params.{field}, where {wanted!r} is wanted,", found)
    return Config(
        text=text,
        vision=tower,
        vq=dataclasses.replace(
            vq,
            num_patches=tower.image_size // tower.patch_size,
            projection_dim=width,
            image_token_embed_dim=width,
            num_hidden_layers=gen_aligner.get("depth", 1),
        ),
        aligner_depth=aligner.get("depth", 1),
        **{field: language[field] for field in TOKENS if language.get(field) is not None},
    )


def _part(values: Mapping[str, Any], name: str, *classes: str) -> Mapping[str, Any]:
    """Parameters of a part of one of `classes`."""
    part = values.get(f"{name}_config") or {}
    supported(
        part.get("cls") in classes, f"{name}_config.cls, where {' or '.join(classes)} is wanted,", part.get("cls")
    )
    return part.get("params") or {}


def table(config: Config) -> list[Entry]:
    """As `weights.table`, under the original names."""
    return [_original(entry) for entry in weights.table(config)]


def ties(config: Config) -> Mapping[str, str]:
    """A head that is tied to the embedding, and stored all the same."""
    return {_name(name): _name(other) for name, other in weights.ties(config).items()}


def unused(name: str) -> bool:
    """Whether a tensor is of what Janus never runs: SigLIP's pooling head, and the codes last seen in training."""
    return name.startswith("vision_model.vision_tower.attn_pool.") or name == "gen_vision_model.quantize.codebook_used"


def _name(name: str) -> str:
    if name.startswith(("model.language_model.", "lm_head.")):
        return "language_model." + re.sub(r"^model\.language_model\.", "model.", name)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    # An MLP's activations have numbers as well.
    name = re.sub(r"^((?:gen_)?aligner)\.fc1\.", r"\1.layers.0.", name)
    return re.sub(r"\.hidden_layers\.(\d+)\.", lambda match: f".layers.{2 * int(match[1]) + 2}.", name)


def _original(entry: Entry) -> Entry:
    names: Names = entry.names
    if entry.path.startswith("visual/layers/qkv/"):
        names = tuple(layer[0] for layer in names)
        shape = (3 * entry.shape[0], *entry.shape[1:])
        entry = dataclasses.replace(entry, shape=shape, transform=_QKV if len(shape) == 2 else _QKV_BIAS)
    elif entry.path == "visual/position_embedding":
        entry = dataclasses.replace(entry, shape=(1, *entry.shape), transform=_POSITIONS)
    return dataclasses.replace(entry, names=weights.renamed(names, _name))
