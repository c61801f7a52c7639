"""What the supervised stages of the tiny world share: rendered batches, a plain training step, initial weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.convert import folder
from uae_jax.data.shapes.render import render
from uae_jax.data.shapes.scene import Scene, sample_scene, split_seed
from uae_jax.step import Metrics, State, apply_gradient
from uae_jax.umm import Params

Loss = Callable[[Params, Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]


class SceneBatches:
    """Fresh scenes at every step: batch `step` is a pure function of (seed, step)."""

    def __init__(
        self,
        seed: int,
        batch_size: int,
        image_size: int,
        fields: Callable[[list[Scene], np.random.Generator, int], dict[str, np.ndarray]],
        scenes: Callable[[int, int, int], list[Scene]] | None = None,
    ):
        """
        Args:
          fields: (scenes, rng, step) -> further arrays [b, ...] of the batch.
          scenes: (seed, step, batch_size) -> scenes; uniform by default.
        """
        self.seed, self.batch_size, self.image_size, self.fields = seed, batch_size, image_size, fields
        self.scenes = scenes or uniform_scenes

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        scenes = self.scenes(self.seed, step, self.batch_size)
        images = np.stack([render(scene, self.image_size) for scene in scenes])
        return {"image": images} | self.fields(scenes, np.random.default_rng([self.seed, step, 1]), step)


def uniform_scenes(seed: int, step: int, batch_size: int) -> list[Scene]:
    """The next `batch_size` scenes of the training split."""
    return [sample_scene(split_seed(seed, "train"), step * batch_size + i) for i in range(batch_size)]


def model_config(config: Any, name: str) -> Any:
    """The sizes of a model that starts from nothing: `config.models[name]` holds what its config.json will."""
    raw = config.models[name].to_dict()
    config_class, _ = folder.ARCHITECTURES[folder.architecture(raw)]
    return config_class.from_hf(raw)


def initial_state(key: jax.Array, params: Params, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), key, params, optimizer.init(params), jnp.int32(0))


def supervised_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[State, Any, dict[str, jax.Array]], tuple[State, Metrics]]:
    """One gradient step on `loss(params, frozen, batch, key) -> (loss, metrics)`."""

    def step(state: State, frozen: Any, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        batch = batch | {"image": batch["image"].astype(jnp.float32) / 255.0}
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, batch, key)
        state, norm, _ = apply_gradient(state, gradient, optimizer)
        return state.replace(step=state.step + 1), metrics | {"grad_norm": norm, "bad_steps": state.bad_steps}

    return step
