"""Name table of Qwen2.5-VL, in the key layout of the hub's checkpoints (`model.layers.*`, `visual.*`)."""

from collections.abc import Mapping

from uae_jax.convert.table import KEEP, LINEAR, PATCHES, Entry, Names, layers
from uae_jax.models.qwen2_5_vl.config import Config, TextConfig, VisionConfig
from uae_jax.sharding import COPIED, Rules, Split, divided


def table(config: Config) -> list[Entry]:
    """Every parameter of `Qwen2_5_VL(config)`; scanned layers are stacked along leading axes."""
    return _vision(config.vision) + text_table(config.text)


# Prefixes in the hub's layout, which transformers 4.x has in memory and every release reads and writes by default, and
# in that of transformers' classes since 4.52.
_PREFIXES = (("model.", "model.language_model."), ("visual.", "model.visual."))


def canonical(name: str) -> str:
    """The table's name of a tensor, given that or transformers' newer one."""
    return next((hub + name.removeprefix(new) for hub, new in _PREFIXES if name.startswith(new)), name)


def module_name(name: str) -> str:
    """Inverse of `canonical`: the table's name -> that of transformers' classes."""
    return next((new + name.removeprefix(hub) for hub, new in _PREFIXES if name.startswith(hub)), name)


def ties(config: Config) -> Mapping[str, str]:
    """A head that is tied to the embedding, and stored all the same."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.text.tie_word_embeddings else {}


def _linear(path: str, names: Names, inputs: int, outputs: int, bias: bool) -> list[Entry]:
    entries = [Entry(f"{path}/kernel", _append(names, ".weight"), (outputs, inputs), LINEAR)]
    if bias:
        entries.append(Entry(f"{path}/bias", _append(names, ".bias"), (outputs,), KEEP))
    return entries


def _norm(path: str, names: Names, size: int) -> list[Entry]:
    return [Entry(f"{path}/scale", _append(names, ".weight"), (size,), KEEP)]


def _append(names: Names, suffix: str) -> Names:
    return names + suffix if isinstance(names, str) else tuple(_append(name, suffix) for name in names)


def _mlp(path: str, names: Names, d: int, width: int, bias: bool) -> list[Entry]:
    return [
        entry
        for name, inputs, outputs in (("gate_proj", d, width), ("up_proj", d, width), ("down_proj", width, d))
        for entry in _linear(f"{path}/{name}", _append(names, f".{name}"), inputs, outputs, bias)
    ]


def _vision(c: VisionConfig) -> list[Entry]:
    d, k, merged = c.hidden_size, c.period, c.hidden_size * c.merge_unit

    def block(path: str, names: Names) -> list[Entry]:
        return [
            *_norm(f"{path}/norm1", _append(names, ".norm1"), d),
            *_linear(f"{path}/attn/qkv", _append(names, ".attn.qkv"), d, 3 * d, bias=True),
            *_linear(f"{path}/attn/proj", _append(names, ".attn.proj"), d, d, bias=True),
            *_norm(f"{path}/norm2", _append(names, ".norm2"), d),
            *_mlp(f"{path}/mlp", _append(names, ".mlp"), d, c.intermediate_size, bias=True),
        ]

    starts = range(0, c.depth, k)
    windowed = tuple(layers("visual.blocks.{}", range(start, start + k - 1)) for start in starts)
    full = layers("visual.blocks.{}", (start + k - 1 for start in starts))
    kernel = (d, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    return [
        Entry("visual/patch_embed/kernel", "visual.patch_embed.proj.weight", kernel, PATCHES),
        *(block("visual/blocks/windowed", windowed) if k > 1 else []),
        *block("visual/blocks/full", full),
        *_norm("visual/merger/ln_q", "visual.merger.ln_q", d),
        *_linear("visual/merger/mlp_0", "visual.merger.mlp.0", merged, merged, bias=True),
        *_linear("visual/merger/mlp_2", "visual.merger.mlp.2", merged, c.out_hidden_size, bias=True),
    ]


def text_table(c: TextConfig) -> list[Entry]:
    """Entries of the language model with its head."""
    d, path = c.hidden_size, "language/layers"
    names = layers("model.layers.{}", range(c.num_layers))
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    entries = [
        Entry("language/embed_tokens/embedding", "model.embed_tokens.weight", (c.vocab_size, d)),
        *_norm(f"{path}/input_layernorm", _append(names, ".input_layernorm"), d),
        *(
            entry
            for name, inputs, outputs, bias in (
                ("q_proj", d, q, c.attention_bias),
                ("k_proj", d, kv, c.attention_bias),
                ("v_proj", d, kv, c.attention_bias),
                ("o_proj", q, d, False),
            )
            for entry in _linear(
                f"{path}/self_attn/{name}", _append(names, f".self_attn.{name}"), inputs, outputs, bias
            )
        ),
        *_norm(f"{path}/post_attention_layernorm", _append(names, ".post_attention_layernorm"), d),
        *_mlp(f"{path}/mlp", _append(names, ".mlp"), d, c.intermediate_size, bias=False),
        *_norm("language/norm", "model.norm", d),
    ]
    if not c.tie_word_embeddings:
        entries += _linear("language/lm_head", "lm_head", d, c.vocab_size, bias=False)
    return entries


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `Qwen2_5_VL(config)`: the vision tower, which runs once an image, is not split by tensor."""
    return (*COPIED, *text_rules(config.text, tensor), (r"visual/(?:.*/)?kernel", Split.GATHERED))


def text_rules(c: TextConfig, tensor: int) -> Rules:
    """Of the language model: tensor splits heads, the width of the MLP and the vocabulary, each if it divides.

    Key and value heads past their number are on every device of the axis, as are what they cache.
    """
    heads, keys, width, words = c.num_heads, c.num_kv_heads, c.intermediate_size, c.vocab_size
    path = "language/layers"
    return (
        (f"{path}/self_attn/q_proj/kernel", divided(Split.COLUMNS, heads, tensor)),
        (f"{path}/self_attn/[kv]_proj/kernel", divided(Split.COLUMNS, keys, tensor)),
        (f"{path}/self_attn/o_proj/kernel", divided(Split.ROWS, heads, tensor)),
        (f"{path}/mlp/(?:gate|up)_proj/kernel", divided(Split.COLUMNS, width, tensor)),
        (f"{path}/mlp/down_proj/kernel", divided(Split.ROWS, width, tensor)),
        ("language/embed_tokens/embedding", divided(Split.ROWS, words, tensor)),
        ("language/lm_head/kernel", divided(Split.COLUMNS, words, tensor)),
    )
