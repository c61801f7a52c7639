"""Qwen2.5-VL: vision tower and language model behind methods of one module."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.models.qwen2_5_vl.config import Config
from uae_jax.models.qwen2_5_vl.language import Cache, LanguageModel, text_positions, with_images
from uae_jax.models.qwen2_5_vl.vision import Layout, VisionTower


class Qwen2_5_VL(nn.Module):
    """`Qwen2_5_VLForConditionalGeneration`; parameters under `visual` and `language`.

    Methods are reached as `model.apply({"params": params}, ..., method="encode_image")`.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    def setup(self) -> None:
        self.visual = VisionTower(self.config.vision, self.dtype, self.remat)
        self.language = LanguageModel(self.config.text, self.dtype, self.remat)

    def __call__(
        self, patches: jax.Array, layout: Layout, tokens: jax.Array, positions: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Float32 logits [..., t, v] of a prompt with its images; arguments as in the methods below."""
        embeds = self.embed(tokens, self.encode_image(patches, layout))
        return self.logits(self.hidden(embeds, positions, mask)[0])

    def encode_image(self, patches: jax.Array, layout: Layout) -> jax.Array:
        """Patches [..., w, l, patch_dim] by window -> merged tokens [..., n, d]; see `VisionTower`."""
        return self.visual(patches, layout)

    def embed(self, tokens: jax.Array, image_features: jax.Array | None = None) -> jax.Array:
        """Token embeddings; the i-th image placeholder of a row is replaced by the row's i-th image feature.

        Args:
          tokens: int [..., t].
          image_features: [..., n, d]; at least as many as the row has placeholders, the rest is not used. Leading
            axes of size 1 broadcast.

        Returns:
          [..., t, d].
        """
        embeds = self.language.embed(tokens)
        if image_features is None:
            return embeds
        return with_images(embeds, tokens == self.config.image_token_id, image_features)

    def hidden(
        self,
        embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: Cache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache]:
        """Final hidden states [..., t, d] and the cache; see `LanguageModel.__call__`."""
        return self.language(embeds, positions, mask, cache, index)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., d] -> float32 [..., v]."""
        return self.language.logits(hidden)

    @nn.nowrap
    def text_positions(self, positions: jax.Array) -> jax.Array:
        """Positions of plain text, int [..., t], as `hidden` takes them."""
        return text_positions(positions)

    @nn.nowrap
    def init_cache(self, batch_shape: Sequence[int], length: int) -> Cache:
        """An empty cache of `length` slots for rows `[*batch_shape]`; needs no parameters."""
        text = self.config.text
        shape = (text.num_layers, *batch_shape, length, text.num_kv_heads, text.head_dim)
        return Cache(k=jnp.zeros(shape, self.dtype), v=jnp.zeros(shape, self.dtype))
