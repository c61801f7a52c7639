"""The scheduler of a diffusers folder: FlowMatchEulerDiscreteScheduler, as SD3 and FLUX use it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uae_jax.errors import UserError
from uae_jax.sampling import flow

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
FILE = "scheduler_config.json"
# What the class can also do and neither model uses; a false or absent value asks for nothing.
_UNSUPPORTED = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """Where the noise levels of a model lie; defaults are diffusers'.

    Attributes:
      shift: moves noise levels towards 1 (`flow.shifted`); not read with use_dynamic_shifting.
      use_dynamic_shifting: the shift grows with the number of image tokens instead.
      base_shift: mu at base_image_seq_len tokens.
      max_shift: mu at max_image_seq_len tokens; linear between and beyond the two.
      base_image_seq_len: see above.
      max_image_seq_len: see above.
      time_shift_type: the shift is e**mu (exponential) or mu (linear).
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"

    def __post_init__(self) -> None:
        if self.time_shift_type not in ("exponential", "linear"):
            raise UserError(f"time_shift_type {self.time_shift_type!r} is neither exponential nor linear")
        if self.shift <= 0:
            raise UserError(f"a scheduler's shift must be above 0, not {self.shift}")
        if self.base_image_seq_len == self.max_image_seq_len:
            raise UserError(f"base_image_seq_len and max_image_seq_len are both {self.base_image_seq_len}")

    def shift_of(self, image_tokens: int) -> float:
        """The shift for images of so many tokens (pixels of the latent / 4 in SD3 and FLUX)."""
        if not self.use_dynamic_shifting:
            return self.shift
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (image_tokens - self.base_image_seq_len)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu

    def sigmas(self, steps: int, spacing: str, image_tokens: int) -> np.ndarray:
        """Noise levels float32 [steps + 1] from 1 to 0; a model's timestep is a level times 1000.

        Args:
          steps: of the sampler.
          spacing: `diffusers` as SD3's pipeline has it, or `uniform`, FLUX's (see `flow.sigmas`).
          image_tokens: see `shift_of`.
        """
        return flow.sigmas(steps, self.shift_of(image_tokens), spacing, once=self.use_dynamic_shifting)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "Scheduler":
        """Reads diffusers' `scheduler_config.json`; fields left out take diffusers' defaults.

        Raises:
          UserError: it is another scheduler's, or asks for what is not supported.
        """
        name = hf.get("_class_name", CLASS_NAME)
        if name != CLASS_NAME:
            raise UserError(
                f"this is a {name} config, not a {CLASS_NAME} one: only flow-matching models can be sampled"
            )
        fields = [f.name for f in dataclasses.fields(cls)]
        timesteps = hf.get("num_train_timesteps", flow.TRAIN_TIMESTEPS)
        refused = [f"{key}={hf[key]}" for key in _UNSUPPORTED if hf.get(key)]
        refused += [] if timesteps == flow.TRAIN_TIMESTEPS else [f"num_train_timesteps={timesteps}"]
        known = {*fields, *_UNSUPPORTED, "num_train_timesteps"}
        refused += [f"{key}={hf[key]}" for key in sorted(hf) if not key.startswith("_") and key not in known]
        if refused:
            raise UserError(f"{CLASS_NAME} config: not supported: {', '.join(refused)}")
        return cls(**{key: hf[key] for key in fields if key in hf})

    def to_hf(self) -> dict[str, Any]:
        """The `scheduler_config.json` that diffusers reads."""
        return {"_class_name": CLASS_NAME, "num_train_timesteps": flow.TRAIN_TIMESTEPS, **dataclasses.asdict(self)}


def load(folder: Path) -> Scheduler:
    """The scheduler of a pipeline's `scheduler/` folder.

    Raises:
      UserError: the file is missing or damaged, or is of another kind (see `Scheduler.from_hf`).
    """
    path = folder / FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name the scheduler folder of a diffusers pipeline") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from None
    try:
        return Scheduler.from_hf(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save(folder: Path, scheduler: Scheduler) -> None:
    """Writes what `load` and diffusers read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(scheduler.to_hf(), indent=2) + "\n")
