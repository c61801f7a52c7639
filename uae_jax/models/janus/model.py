"""Janus and Janus-Pro: one language model that reads images by SigLIP features and draws them as VQ codes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from uae_jax.models.dense import Dense
from uae_jax.models.janus.config import Config
from uae_jax.models.janus.vision import MLP, VisionTower
from uae_jax.models.janus.vq import VQModel
from uae_jax.models.qwen2_5_vl.language import Cache, LanguageModel, with_images


class CodeHead(nn.Module):
    """`JanusVQVAEHead`: states [..., d] -> float32 logits over the codebook [..., codes]."""

    codes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = Dense(hidden.shape[-1], dtype=self.dtype, name="proj_out")(hidden)
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        head = Dense(self.codes, dtype=self.dtype, dot_general=product, name="vision_head")
        return head(nn.gelu(x, approximate=False)).astype(jnp.float32)


class Janus(nn.Module):
    """`JanusForConditionalGeneration` (deepseek-ai's `MultiModalityCausalLM`).

    Parameters lie under `visual`, `aligner`, `language`, `gen_embed`, `gen_aligner`, `gen_head` and `vq`. Methods are
    reached as `model.apply({"params": params}, ..., method="encode_image")`.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    def setup(self) -> None:
        c, width = self.config, self.config.text.hidden_size
        self.visual = VisionTower(c.vision, self.dtype, self.remat)
        self.aligner = MLP(c.aligner_depth, width, self.dtype)
        self.language = LanguageModel(c.text, self.dtype, self.remat)
        self.gen_embed = nn.Embed(c.vq.num_embeddings, c.vq.embed_dim, dtype=self.dtype)
        self.gen_aligner = MLP(c.vq.num_hidden_layers, width, self.dtype)
        self.gen_head = CodeHead(c.vq.num_embeddings, self.dtype)
        self.vq = VQModel(c.vq, self.dtype)

    def __call__(self, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Reads a prompt with its image, then the same image as codes; every parameter has its part.

        Args:
          images: [..., H, W, 3] in 0..1, of the tower's size.
          tokens: int [..., t].

        Returns:
          Logits of text float32 [..., t, v], logits of codes float32 [..., n, codebook], and the image through its
          codes, [..., H, W, 3] in 0..1.
        """
        codes = self.encode_codes(images)
        embeds = self.embed(tokens, self.encode_image(2 * images - 1))
        embeds = jnp.concatenate([embeds, self.embed_codes(codes)], axis=-2)
        n, t = codes.shape[-1], embeds.shape[-2]
        positions = jnp.broadcast_to(jnp.arange(t), embeds.shape[:-1])
        hidden, _ = self.hidden(embeds, positions, jnp.tril(jnp.ones((t, t), bool)))
        return self.logits(hidden[..., :-n, :]), self.code_logits(hidden[..., -n:, :]), self.decode_codes(codes)

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Pixels [..., H, W, 3] in -1..1 -> features [..., n, d] for `embed`, row by row.

        Raises:
          UserError: the images are not of the config's size.
        """
        return self.aligner(self.visual(images))

    def embed(self, tokens: jax.Array, image_features: jax.Array | None = None) -> jax.Array:
        """Token embeddings [..., t, d]; the i-th image placeholder of a row is the row's i-th image feature.

        Args:
          tokens: int [..., t].
          image_features: [..., n, d]; see `with_images`.
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
        """Final hidden states [..., t, d] and the cache, for positions int [..., t]; see `LanguageModel.__call__`."""
        return self.language(embeds, positions[None], mask, cache, index)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Of the next token of text: [..., d] -> float32 [..., v]."""
        return self.language.logits(hidden)

    def embed_codes(self, codes: jax.Array) -> jax.Array:
        """Image tokens as the language model reads them: int [..., t] -> [..., t, d]."""
        return self.gen_aligner(self.gen_embed(codes))

    def code_logits(self, hidden: jax.Array) -> jax.Array:
        """Of the next image token: [..., d] -> float32 [..., codebook]."""
        return self.gen_head(hidden.astype(self.dtype))

    @nn.nowrap
    def text_positions(self, positions: jax.Array) -> jax.Array:
        """Positions of plain text, int [..., t], as `hidden` takes them: these."""
        return positions

    def encode_codes(self, images: jax.Array) -> jax.Array:
        """The codes of images [..., H, W, 3] in 0..1, row by row: int32 [..., n]."""
        codes = self.vq.quantise(self.vq.encode(2 * images - 1))
        return codes.reshape(*codes.shape[:-2], -1)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Images [..., H, W, 3] in 0..1 of codes int [..., n], n being `config.vq.num_patches` squared."""
        side = self.config.vq.num_patches
        images = self.vq.decode(codes.reshape(*codes.shape[:-1], side, side))
        return jnp.clip((images.astype(jnp.float32) + 1) / 2, 0, 1)
