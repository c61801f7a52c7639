"""MM-DiT of Stable Diffusion 3 and 3.5 (Esser et al. 2024, figure 2): diffusers' `SD3Transformer2DModel`.

Image and text are two residual streams with their own weights that meet in one attention, image tokens first. SD3.5
medium adds a second attention among image tokens in its first blocks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.errors import UserError
from uae_jax.models import rematerialised
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.mmdit import NEAR_ZERO, Embedder, FeedForward, Modulation, layer_norm, modulate, timestep_embedding
from uae_jax.models.sd3.config import Config
from uae_jax.sharding import batch_kept


def position_table(config: Config) -> jax.Array:
    """Fixed 2-D sine-cosine positions, float32 [1, pos_embed_max_size**2, width], rows of the grid first.

    The first half of the channels encodes the column, the second half the row, each as [sin, cos] (the order of
    diffusers' `get_2d_sincos_pos_embed`). A grid step is sample_size / patch_size / pos_embed_max_size.
    """
    size, quarter = config.pos_embed_max_size, config.width // 4
    scale = size / (config.sample_size // config.patch_size)
    positions = np.arange(size, dtype=np.float32) / np.float32(scale)
    angles = np.outer(positions.astype(np.float64), 10000.0 ** -(np.arange(quarter) / quarter))
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    # Only the [size, width / 2] factor is a constant of the program: the table of SD3.5 medium holds 226 M floats.
    columns = jnp.broadcast_to(axis[None, :, :], (size, size, 2 * quarter))
    rows = jnp.broadcast_to(axis[:, None, :], (size, size, 2 * quarter))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size * size, config.width)


class Attention(nn.Module):
    """Self-attention of image tokens, or joint attention of [image, text] (diffusers' `JointAttnProcessor2_0`)."""

    config: Config
    dtype: jnp.dtype
    text_out: bool = True

    @nn.compact
    def __call__(
        self, image: jax.Array, text: jax.Array | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """image [..., t, d], text [..., s, d], mask bool [..., s] -> both outputs, text's None without text_out."""

        def project(x: jax.Array, name: str, norm: str) -> tuple[jax.Array, jax.Array, jax.Array]:
            heads = (*x.shape[:-1], self.config.num_attention_heads, self.config.attention_head_dim)
            q, k, v = (
                Dense(self.config.width, dtype=self.dtype, name=name.format(part))(x).reshape(heads) for part in "qkv"
            )
            if self.config.qk_norm:
                q, k = (
                    nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=norm.format(part))(y)
                    for part, y in (("q", q), ("k", k))
                )
            return q, k, v

        def out(x: jax.Array, name: str) -> jax.Array:
            return Dense(self.config.width, dtype=self.dtype, name=name)(x.reshape(*x.shape[:-2], self.config.width))

        q, k, v = project(image, "to_{}", "norm_{}")
        if text is None:
            return out(attention(q, k, v), "to_out"), None
        added = project(text, "add_{}_proj", "norm_added_{}")
        q, k, v = (jnp.concatenate(pair, axis=-3) for pair in zip((q, k, v), added, strict=True))
        t = image.shape[-2]
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(t, 0)], constant_values=True)[..., None, :]
        x = attention(q, k, v, mask)
        return out(x[..., :t, :, :], "to_out"), out(x[..., t:, :, :], "to_add_out") if self.text_out else None


class Block(nn.Module):
    """Joint transformer block (diffusers' `JointTransformerBlock`).

    Attributes:
      dual: adds the second attention, among image tokens.
      last: leaves the text as it is (`context_pre_only`).
    """

    config: Config
    dtype: jnp.dtype
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], condition: jax.Array, mask: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """streams (image [..., t, d], text [..., s, d]), condition [..., d] after its SiLU, mask bool [..., s]."""
        image, text = map(batch_kept, streams)
        chunks = Modulation(9 if self.dual else 6, self.dtype, name="norm1")(condition)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = chunks[:6]
        normed = layer_norm(self.dtype)(image)
        normed_text = layer_norm(self.dtype)(text)
        if self.last:
            text_scale, text_shift = Modulation(2, self.dtype, name="norm1_context")(condition)
        else:
            text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = Modulation(
                6, self.dtype, name="norm1_context"
            )(condition)

        joint = Attention(self.config, self.dtype, text_out=not self.last, name="attn")
        x, y = joint(modulate(normed, shift, scale), modulate(normed_text, text_shift, text_scale), mask)
        image = image + gate * x
        if self.dual:
            shift2, scale2, gate2 = chunks[6:]
            x, _ = Attention(self.config, self.dtype, name="attn2")(modulate(normed, shift2, scale2))
            image = image + gate2 * x
        x = modulate(layer_norm(self.dtype)(image), shift_ff, scale_ff)
        image = image + gate_ff * FeedForward(self.dtype, name="ff")(x)

        if y is not None:
            text = text + text_gate * y
            y = modulate(layer_norm(self.dtype)(text), text_shift_ff, text_scale_ff)
            text = text + text_gate_ff * FeedForward(self.dtype, name="ff_context")(y)
        return (image, text), None


class SD3Transformer(nn.Module):
    """Velocity of a latent given text and time (Esser et al. 2024; diffusers' `SD3Transformer2DModel`).

    Parameters: pos_embed, time_embedder, pooled_embedder, context_embedder, dual_blocks and blocks (each stacked along
    a leading layer axis, absent when empty), last_block, norm_out, proj_out. Block outputs can be read with flax's
    `capture_intermediates`.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms, softmax and time sinusoids compute in float32.
      remat: what of a block the backward pass computes again; see `models.REMAT`.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "full"

    @nn.compact
    def __call__(
        self,
        latents: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        timestep: jax.Array,
        text_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the velocity (noise minus image).

        Args:
          latents: [..., H, W, in_channels], noised; sides are multiples of patch_size.
          text: [..., s, joint_attention_dim].
          pooled: [..., pooled_projection_dim].
          timestep: [...], 0 (image) to 1000 (noise).
          text_mask: bool [..., s]; False hides a text token from every other token. diffusers has no such mask: None
            is its behaviour.

        Returns:
          [..., H, W, out_channels] in `dtype`.

        Raises:
          UserError: the latents do not divide into patches, or exceed the position table.
        """
        config = self.config
        *batch, height, width, channels = latents.shape
        p, size = config.patch_size, config.pos_embed_max_size
        rows, columns = height // p, width // p
        if height % p or width % p or max(rows, columns) > size:
            raise UserError(f"latents of {height}x{width} do not make {p}x{p} patches within a {size}x{size} table")

        patches = jnp.einsum("...hpwqc->...hwcpq", latents.reshape(*batch, rows, p, columns, p, channels))
        image = PatchEmbed(config, self.dtype, name="pos_embed")(
            patches.reshape(*batch, rows, columns, channels * p * p)
        ).reshape(*batch, rows * columns, config.width)
        text = Dense(config.width, dtype=self.dtype, name="context_embedder")(text)
        time = Embedder(config.width, self.dtype, name="time_embedder")(timestep_embedding(timestep))
        # Every modulation of the model starts with this SiLU: applied once.
        condition = nn.silu(time + Embedder(config.width, self.dtype, name="pooled_embedder")(pooled))

        def stack(length: int, dual: bool, name: str) -> nn.Module:
            block = nn.scan(
                rematerialised(Block, self.remat),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=length,
            )
            return block(config, self.dtype, dual=dual, name=name)

        streams = (batch_kept(image), batch_kept(text))
        if config.num_dual:
            streams, _ = stack(config.num_dual, True, "dual_blocks")(streams, condition, text_mask)
        if config.num_plain:
            streams, _ = stack(config.num_plain, False, "blocks")(streams, condition, text_mask)
        # Its activations are the first that the backward pass needs: rematerialising them would save nothing.
        (image, _), _ = Block(config, self.dtype, last=True, name="last_block")(streams, condition, text_mask)

        scale, shift = Modulation(2, self.dtype, name="norm_out")(condition)
        image = modulate(layer_norm(self.dtype)(image), shift, scale)
        head = Dense(p * p * config.out_channels, dtype=self.dtype, kernel_init=NEAR_ZERO, name="proj_out")
        image = head(image).reshape(*batch, rows, columns, p, p, config.out_channels)
        return jnp.einsum("...hwpqc->...hpwqc", image).reshape(*batch, height, width, config.out_channels)


class PatchEmbed(nn.Module):
    """Projects patches and adds the centre of the position table: [..., h, w, C*p*p] -> [..., h, w, d]."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        rows, columns = patches.shape[-3:-1]
        size = self.config.pos_embed_max_size
        table = self.param("pos_embed", lambda _: position_table(self.config))
        # A buffer of the reference: part of the checkpoint, never trained.
        table = jax.lax.stop_gradient(table).reshape(size, size, self.config.width)
        top, left = (size - rows) // 2, (size - columns) // 2
        x = Dense(self.config.width, dtype=self.dtype, name="proj")(patches)
        return (x + table[top : top + rows, left : left + columns].astype(jnp.float32)).astype(self.dtype)
