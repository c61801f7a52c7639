"""A word-level tokenizer for the shapes world, in the format of the tokenizers library (tokenizer.json)."""

import tokenizers
from tokenizers import models, pre_tokenizers

from uae_jax.data.shapes.grammar import WORDS

# Ids 0 to 6, in this order; the first one pads.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|unk|>",
)


def build() -> tokenizers.Tokenizer:
    """The tokenizer: ids 0..6 are `SPECIAL`, then the 30 words of the grammar in alphabetical order (37 in all).

    Special tokens need no spaces around them; other words are separated by spaces, unknown ones become `<|unk|>`.
    `decode` joins words by single spaces. Write it with `build().save(path)`.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer
