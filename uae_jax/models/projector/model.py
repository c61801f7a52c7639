"""The projector g: last-layer hidden states of the text encoder -> condition of the decoder, token by token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from uae_jax.convert.table import LINEAR, Entry
from uae_jax.errors import UserError
from uae_jax.models.dense import Dense


@dataclasses.dataclass(frozen=True)
class Config:
    """Widths of the projector; `whiten` standardises the states first (the tiny world needs it, UAE has none)."""

    in_size: int
    hidden_size: int
    out_size: int
    whiten: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        try:
            return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
        except KeyError as error:
            raise UserError(f"the projector's config.json lacks {error}") from None

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["Projector"], **dataclasses.asdict(self)}


class Projector(nn.Module):
    """Linear -> GELU -> Linear (UAE: 2048 -> 8192 -> 4096), after a fixed whitening if the config has one.

    Hidden states hold every word, but along directions of tiny variance; `(h - mean) @ matrix`, fitted once on captions
    and never trained, gives them equal weight.
    """

    config: Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., t, in] -> [..., t, out]."""
        size = self.config.in_size
        if self.config.whiten:
            mean = self.param("mean", nn.initializers.zeros, (size,))
            matrix = self.param("matrix", lambda key, shape: jnp.eye(*shape), (size, size))
            # At a TPU's default precision (bfloat16) the directions of tiny variance would drown in rounding errors.
            hidden = jnp.matmul(
                hidden.astype(jnp.float32) - jax.lax.stop_gradient(mean),
                jax.lax.stop_gradient(matrix),
                precision=jax.lax.Precision.HIGHEST,
            )
        hidden = nn.gelu(Dense(self.config.hidden_size, dtype=self.dtype, name="linear_1")(hidden), approximate=False)
        return Dense(self.config.out_size, dtype=self.dtype, name="linear_2")(hidden)


def table(config: Config) -> list[Entry]:
    """UAE's names: an `nn.Sequential` of Linear (0), GELU and Linear (2)."""
    entries = [
        Entry("linear_1/kernel", "0.weight", (config.hidden_size, config.in_size), LINEAR),
        Entry("linear_1/bias", "0.bias", (config.hidden_size,)),
        Entry("linear_2/kernel", "2.weight", (config.out_size, config.hidden_size), LINEAR),
        Entry("linear_2/bias", "2.bias", (config.out_size,)),
    ]
    if config.whiten:
        entries += [
            Entry("mean", "whitening.mean", (config.in_size,)),
            Entry("matrix", "whitening.matrix", (config.in_size, config.in_size)),
        ]
    return entries
