"""Name table of Janus in the key layout of transformers' checkpoints (`model.vision_model.*`, `lm_head`)."""

import dataclasses
from collections.abc import Callable, Mapping

from uae_jax.convert.table import LINEAR, PATCHES, Entry, Names, layers
from uae_jax.models.janus import vq_weights
from uae_jax.models.janus.config import Config, VisionConfig
from uae_jax.models.qwen2_5_vl import weights as qwen_weights
from uae_jax.sharding import COPIED, Rules, Split, divided


def table(config: Config) -> list[Entry]:
    """Every parameter of `Janus(config)`; scanned layers, and a layer's query, key and value, are stacked."""
    d, vq = config.text.hidden_size, config.vq
    return [
        *_vision(config.vision),
        *_mlp("aligner", "model.aligner", config.aligner_depth, config.vision.hidden_size, d),
        *(
            dataclasses.replace(entry, names=renamed(entry.names, qwen_weights.module_name))
            for entry in qwen_weights.text_table(config.text)
        ),
        Entry("gen_embed/embedding", "model.generation_embeddings.weight", (vq.num_embeddings, vq.embed_dim)),
        *_mlp("gen_aligner", "model.generation_aligner", vq.num_hidden_layers, vq.embed_dim, d),
        *_linear("gen_head/proj_out", "model.generation_head.proj_out", d, d),
        *_linear("gen_head/vision_head", "model.generation_head.vision_head", d, vq.num_embeddings),
        *(
            dataclasses.replace(entry, path=f"vq/{entry.path}", names=renamed(entry.names, "model.vqmodel.{}".format))
            for entry in vq_weights.table(vq)
        ),
    ]


def ties(config: Config) -> Mapping[str, str]:
    """A head that is tied to the embedding, and stored all the same."""
    return {"lm_head.weight": "model.language_model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}


def renamed(names: Names, rename: Callable[[str], str]) -> Names:
    """All names of an entry, changed one by one."""
    return rename(names) if isinstance(names, str) else tuple(renamed(name, rename) for name in names)


def _linear(path: str, names: Names, inputs: int, outputs: int, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{path}/kernel", renamed(names, "{}.weight".format), (outputs, inputs), LINEAR)]
    return [*entries, Entry(f"{path}/bias", renamed(names, "{}.bias".format), (outputs,))] if bias else entries


def _norm(path: str, names: Names, size: int) -> list[Entry]:
    return [
        Entry(f"{path}/scale", renamed(names, "{}.weight".format), (size,)),
        Entry(f"{path}/bias", renamed(names, "{}.bias".format), (size,)),
    ]


def _mlp(path: str, name: str, depth: int, inputs: int, width: int) -> list[Entry]:
    names = [f"{name}.fc1", *layers(f"{name}.hidden_layers.{{}}", range(depth - 1))]
    return [
        entry
        for i, layer in enumerate(names)
        for entry in _linear(f"{path}/layer_{i}", layer, width if i else inputs, width)
    ]


def _vision(c: VisionConfig) -> list[Entry]:
    d, p, path, start = c.hidden_size, c.patch_size, "visual/layers", "model.vision_model"
    blocks = layers(f"{start}.encoder.layers.{{}}", range(c.num_hidden_layers))

    def each(name: str) -> Names:
        return renamed(blocks, lambda block: f"{block}.{name}")

    qkv = tuple(layers(f"{block}.self_attn.{{}}_proj", "qkv") for block in blocks)  # type: ignore[arg-type]
    kernel = (d, c.num_channels, p, p)
    return [
        Entry("visual/patch_embedding/kernel", f"{start}.embeddings.patch_embedding.weight", kernel, PATCHES),
        Entry("visual/patch_embedding/bias", f"{start}.embeddings.patch_embedding.bias", (d,)),
        Entry("visual/position_embedding", f"{start}.embeddings.position_embedding.weight", (c.num_patches, d)),
        *_norm(f"{path}/norm1", each("layer_norm1"), d),
        *_linear(f"{path}/qkv", qkv, d, d),
        *_linear(f"{path}/out", each("self_attn.projection_layer"), d, d),
        *_norm(f"{path}/norm2", each("layer_norm2"), d),
        *_linear(f"{path}/mlp/up", each("mlp.fc1"), d, c.intermediate_size),
        *_linear(f"{path}/mlp/down", each("mlp.fc2"), c.intermediate_size, d),
        *_norm("visual/post_layernorm", f"{start}.post_layernorm", d),
    ]


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `Janus(config)`: tensor splits the language model and the head over the image's codes."""
    codes = divided(Split.COLUMNS, config.vq.num_embeddings, tensor)
    return (
        *COPIED,
        *qwen_weights.text_rules(config.text, tensor),
        ("gen_head/vision_head/kernel", codes),
        (r"(?:visual|aligner|gen_aligner|gen_head|vq)/(?:.*/)?kernel", Split.GATHERED),
        (r"visual/position_embedding|gen_embed/embedding|vq/codebook", Split.GATHERED),
    )
