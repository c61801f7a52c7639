"""The projector g: last-layer hidden states of the text encoder -> condition of the decoder, token by token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from uae_jax.convert.table import LINEAR, Entry
from uae_jax.errors import UserError
from uae_jax.models.dense import Dense
from uae_jax.sharding import COPIED, Rules, Split

ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=False), "silu": nn.silu}


@dataclasses.dataclass(frozen=True)
class Config:
    """Widths of the projector, and what lies between its two layers.

    Attributes:
      whiten: standardise the states first (the tiny world needs it, no published projector does).
      activation: one of `ACTIVATIONS`.
    """

    in_size: int
    hidden_size: int
    out_size: int
    whiten: bool = False
    activation: str = "gelu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"the projector's activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Config":
        """Reads config.json: our fields, or `kind` (one of `KINDS`), whose fields others may change.

        Raises:
          UserError: a field is missing or unknown: a projector with further streams (UniWorld's siglip_projector and
            vae_projector, for pictures to edit) is not supported.
        """
        values = {name: value for name, value in config.items() if name != "architectures"}
        kind = values.pop("kind", None)
        if kind is not None:
            if kind not in KINDS:
                raise UserError(f"the projector's kind {kind!r} is not one of {', '.join(KINDS)}")
            values = dataclasses.asdict(KINDS[kind]) | values
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        unknown = sorted(values.keys() - {f.name for f in fields})
        if missing or unknown:
            raise UserError(f"the projector's config.json: missing fields {missing}, unknown fields {unknown}")
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        return {"architectures": ["Projector"], **dataclasses.asdict(self)}


# Published projectors: of UAE (Qwen2.5-VL-3B to SD3.5) and UniWorld-V1 (7B to FLUX.1; the tensors below
# denoise_tower.denoise_projector of its checkpoint, whose config calls it mlp2x_gelu though it holds a SiLU).
KINDS = {
    "uae": Config(2048, 8192, 4096),
    "uniworld": Config(3584, 12288, 4096, activation="silu"),
}


class Projector(nn.Module):
    """Linear -> GELU or SiLU -> Linear, after a fixed whitening if the config has one.

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
        hidden = Dense(self.config.hidden_size, dtype=self.dtype, name="linear_1")(hidden)
        hidden = ACTIVATIONS[self.config.activation](hidden)
        return Dense(self.config.out_size, dtype=self.dtype, name="linear_2")(hidden)


def table(config: Config) -> list[Entry]:
    """The published names, those of an `nn.Sequential`: Linear (0), activation, Linear (2)."""
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


def rules(config: Config, tensor: int) -> Rules:
    """Sharding rules of `Projector(config)`: tensor splits no part of it."""
    return (*COPIED, (r"(?:.*/)?(?:kernel|mean|matrix)", Split.GATHERED))
