"""MM-DiT of FLUX.1 (Black Forest Labs 2024): diffusers' `FluxTransformer2DModel`.

Text and image are two residual streams that meet in one attention, text tokens first (SD3 has the image first); after
the double blocks they are one stream, whose blocks run attention and feed-forward side by side. Positions enter as
rotations of queries and keys by three ids a token: all zero for text; zero, row and column for the image.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.errors import UserError
from uae_jax.models import rematerialised
from uae_jax.models.attention import attention
from uae_jax.models.dense import Dense
from uae_jax.models.flux.config import PACK, Config
from uae_jax.models.mmdit import NEAR_ZERO, Embedder, FeedForward, Modulation, layer_norm, modulate, timestep_embedding
from uae_jax.sharding import batch_kept

THETA = 10000.0
# Both inputs of a time embedder, in its units: noise level 1 and guidance scale 1 are both 1000.
SCALE = 1000.0

Rotary = tuple[jax.Array, jax.Array]


def position_ids(text: int, rows: int, columns: int) -> np.ndarray:
    """Ids [text + rows * columns, 3] of text tokens, then image tokens row by row."""
    ids = np.zeros((text + rows * columns, 3))
    ids[text:, 1] = np.repeat(np.arange(rows), columns)
    ids[text:, 2] = np.tile(np.arange(columns), rows)
    return ids


def rotary(ids: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [t, sum(axes) / 2], float32, of ids [t, len(axes)] (diffusers' `FluxPosEmbed`).

    The angles are float64: float32 would be off by 1e-4 of a radian at a position in the thousands.
    """
    angles = [
        np.outer(ids[:, i].astype(np.float64), THETA ** -(np.arange(0, axis, 2) / axis)) for i, axis in enumerate(axes)
    ]
    joined = np.concatenate(angles, axis=1)
    return np.cos(joined).astype(np.float32), np.sin(joined).astype(np.float32)


def rotate(x: jax.Array, table: Rotary) -> jax.Array:
    """Rotates neighbouring channels of [..., t, n, h] by the angles of [t, h / 2], in float32."""
    cos, sin = (part[:, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _project(
    config: Config, dtype: jnp.dtype, x: jax.Array, name: str, norm: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [..., t, n, h] of x [..., t, d], queries and keys normed; called inside a module."""
    heads = (*x.shape[:-1], config.num_attention_heads, config.attention_head_dim)
    q, k, v = (Dense(config.width, dtype=dtype, name=name.format(part))(x).reshape(heads) for part in "qkv")
    q, k = (nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=norm.format(part))(y) for part, y in (("q", q), ("k", k)))
    return q, k, v


class JointAttention(nn.Module):
    """Attention of text and image tokens with weights of their own: outputs like its inputs."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, image: jax.Array, text: jax.Array, table: Rotary, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """image [..., t, d], text [..., s, d], table of s + t tokens, mask bool [..., 1, s + t]."""
        config = self.config
        streams = (
            _project(config, self.dtype, text, "add_{}_proj", "norm_added_{}"),
            _project(config, self.dtype, image, "to_{}", "norm_{}"),
        )
        q, k, v = (jnp.concatenate(pair, axis=-3) for pair in zip(*streams, strict=True))
        x = attention(rotate(q, table), rotate(k, table), v, mask)
        x = x.reshape(*x.shape[:-2], config.width)
        s = text.shape[-2]
        return (
            Dense(config.width, dtype=self.dtype, name="to_out")(x[..., s:, :]),
            Dense(config.width, dtype=self.dtype, name="to_add_out")(x[..., :s, :]),
        )


class SelfAttention(nn.Module):
    """Attention without an output projection: [..., t, d] -> [..., t, d]."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, table: Rotary, mask: jax.Array | None) -> jax.Array:
        q, k, v = _project(self.config, self.dtype, x, "to_{}", "norm_{}")
        return attention(rotate(q, table), rotate(k, table), v, mask).reshape(x.shape)


class DoubleBlock(nn.Module):
    """diffusers' `FluxTransformerBlock`."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array], condition: jax.Array, table: Rotary, mask: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        """streams (image [..., t, d], text [..., s, d]), condition [..., d] after its SiLU; rest: JointAttention."""
        image, text = map(batch_kept, streams)
        changes = Modulation(6, self.dtype, name="norm1")(condition)
        text_changes = Modulation(6, self.dtype, name="norm1_context")(condition)
        x, y = JointAttention(self.config, self.dtype, name="attn")(
            modulate(layer_norm(self.dtype)(image), *changes[:2]),
            modulate(layer_norm(self.dtype)(text), *text_changes[:2]),
            table,
            mask,
        )

        def finish(stream: jax.Array, attended: jax.Array, changes: list[jax.Array], name: str) -> jax.Array:
            _, _, gate, shift, scale, gate_ff = changes
            stream = stream + gate * attended
            normed = modulate(layer_norm(self.dtype)(stream), shift, scale)
            return stream + gate_ff * FeedForward(self.dtype, name=name)(normed)

        return (finish(image, x, changes, "ff"), finish(text, y, text_changes, "ff_context")), None


class SingleBlock(nn.Module):
    """diffusers' `FluxSingleTransformerBlock`, on one stream of text and image."""

    config: Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, table: Rotary, mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        """x [..., s + t, d], condition [..., d] after its SiLU; rest: JointAttention."""
        width, x = self.config.width, batch_kept(x)
        shift, scale, gate = Modulation(3, self.dtype, name="norm")(condition)
        normed = modulate(layer_norm(self.dtype)(x), shift, scale)
        attended = SelfAttention(self.config, self.dtype, name="attn")(normed, table, mask)
        wide = nn.gelu(Dense(4 * width, dtype=self.dtype, name="proj_mlp")(normed), approximate=True)
        out = Dense(width, dtype=self.dtype, name="proj_out")(jnp.concatenate([attended, wide], axis=-1))
        return x + gate * out, None


class FluxTransformer(nn.Module):
    """Velocity of a latent given text, time and guidance (diffusers' `FluxTransformer2DModel`).

    Called like `SD3Transformer`: the latents are the VAE's, and packing 2x2 of their pixels into a token, which
    diffusers leaves to the pipeline, is done here, as are the position ids.

    Parameters: time_embedder, guidance_embedder (with guidance_embeds), pooled_embedder, context_embedder, x_embedder,
    blocks and single_blocks (each stacked along a leading layer axis), norm_out, proj_out. Block outputs can be read
    with flax's `capture_intermediates`.

    Attributes:
      config: sizes.
      dtype: compute dtype; parameters are float32, norms, softmax, rotations and time sinusoids compute in float32
        (diffusers rounds time and guidance to `dtype` first, which in bfloat16 moves the time by several of its 1000).
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
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts the velocity (noise minus image).

        Args:
          latents: [..., H, W, in_channels / 4], noised; sides are multiples of 2.
          text: [..., s, joint_attention_dim].
          pooled: [..., pooled_projection_dim].
          timestep: [...], 0 (image) to 1000 (noise).
          text_mask: bool [..., s]; False hides a text token from every other token. diffusers has no such mask: None
            is its behaviour.
          guidance: [...], the scale of the distilled guidance; needed with guidance_embeds, refused without.

        Returns:
          [..., H, W, out_channels / 4] in `dtype`.

        Raises:
          UserError: the latents do not divide into tokens, or guidance is missing or has no use.
        """
        config = self.config
        *batch, height, width, channels = latents.shape
        rows, columns, s = height // PACK, width // PACK, text.shape[-2]
        if height % PACK or width % PACK:
            raise UserError(f"latents of {height}x{width} do not make {PACK}x{PACK} patches")
        if (guidance is None) == config.guidance_embeds:
            raise UserError(
                "this FLUX is distilled for a guidance scale: pass guidance"
                if config.guidance_embeds
                else "this FLUX takes no guidance scale (guidance_embeds is false in its config): pass none"
            )

        packed = jnp.einsum("...hpwqc->...hwcpq", latents.reshape(*batch, rows, PACK, columns, PACK, channels))
        image = Dense(config.width, dtype=self.dtype, name="x_embedder")(
            packed.reshape(*batch, rows * columns, channels * PACK**2)
        )
        text = Dense(config.width, dtype=self.dtype, name="context_embedder")(text)
        condition = Embedder(config.width, self.dtype, name="time_embedder")(timestep_embedding(timestep))
        if guidance is not None:
            sinusoids = timestep_embedding(guidance.astype(jnp.float32) * SCALE)
            condition += Embedder(config.width, self.dtype, name="guidance_embedder")(sinusoids)
        # Every modulation of the model starts with this SiLU: applied once.
        condition = nn.silu(condition + Embedder(config.width, self.dtype, name="pooled_embedder")(pooled))
        cos, sin = rotary(position_ids(s, rows, columns), config.axes_dims_rope)
        table = (jnp.asarray(cos), jnp.asarray(sin))
        mask = text_mask
        if mask is not None:
            padding = [(0, 0)] * (mask.ndim - 1) + [(0, rows * columns)]
            mask = jnp.pad(mask, padding, constant_values=True)[..., None, :]

        def stack(block: type[nn.Module], length: int, name: str) -> nn.Module:
            scanned = nn.scan(
                rematerialised(block, self.remat),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=length,
            )
            return scanned(config, self.dtype, name=name)

        (image, text), _ = stack(DoubleBlock, config.num_layers, "blocks")(
            (batch_kept(image), batch_kept(text)), condition, table, mask
        )
        x = jnp.concatenate([text, image], axis=-2)
        x, _ = stack(SingleBlock, config.num_single_layers, "single_blocks")(x, condition, table, mask)

        scale, shift = Modulation(2, self.dtype, name="norm_out")(condition)
        image = modulate(layer_norm(self.dtype)(x[..., s:, :]), shift, scale)
        image = Dense(config.token_out, dtype=self.dtype, kernel_init=NEAR_ZERO, name="proj_out")(image)
        image = image.reshape(*batch, rows, columns, -1, PACK, PACK)
        return jnp.einsum("...hwcpq->...hpwqc", image).reshape(*batch, height, width, -1)
