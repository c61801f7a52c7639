"""What stands round a caption, as token ids; and the leaves that training lays over a model's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from uae_jax.errors import UserError
from uae_jax.umm import Params


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids round the caption, as tuples of ints."""

    caption: tuple[int, ...]  # before the caption, one placeholder for the image
    redraw_prefix: tuple[int, ...]
    redraw_suffix: tuple[int, ...]
    negative: tuple[int, ...]
    end_token: int

    @classmethod
    def build(cls, tokenizer: Tokenizer, config: Any, sizes: Any) -> "Prompts":
        """From the template strings of `config.prompt`; one placeholder in them stands for the image.

        Raises:
          UserError: the caption prompt has no or several image placeholders.
        """

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        prompt = encode(config.prompt.caption)
        if prompt.count(sizes.image_token_id) != 1:
            raise UserError(
                f"config.prompt.caption = {config.prompt.caption!r} must hold exactly one image placeholder"
            )
        return cls(
            caption=tuple(prompt),
            redraw_prefix=tuple(encode(config.prompt.redraw_prefix)),
            redraw_suffix=tuple(encode(config.prompt.redraw_suffix)),
            negative=tuple(encode(config.prompt.negative)),
            end_token=sizes.eos_token_id,
        )


def merge(base: Params, changed: Params) -> Params:
    """`base` with the leaves that `changed` holds: of the same tree, or adapters beside its kernels."""
    if not isinstance(changed, dict):
        return changed
    return base | {name: merge(base.get(name, {}), value) for name, value in changed.items()}


def captions_as_text(
    captions: jax.Array, length: jax.Array, prefix: tuple[int, ...], suffix: tuple[int, ...], pad: int
) -> tuple[jax.Array, jax.Array]:
    """[prefix | caption | suffix], left-aligned and padded, by one gather.

    Args:
      captions: int [..., t].
      length: [...], how many of those tokens to keep (without the end token).

    Returns:
      tokens [..., p + t + s] and their mask.
    """
    t, p, s = captions.shape[-1], len(prefix), len(suffix)
    constant = jnp.broadcast_to(jnp.array([*prefix, *suffix, pad], jnp.int32), (*captions.shape[:-1], p + s + 1))
    source = jnp.concatenate([captions, constant], axis=-1)  # caption | prefix | suffix | pad
    at = jnp.arange(p + t + s)
    end = p + length[..., None]
    index = jnp.where(at < p, t + at, jnp.where(at < end, at - p, t + p + at - end))
    mask = at < end + s
    return jnp.take_along_axis(source, jnp.where(mask, index, t + p + s), axis=-1), mask
