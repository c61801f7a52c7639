"""What the supervised stages of the tiny world share: rendered batches, a plain training step, initial weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uae_jax.convert import folder
from uae_jax.data.shapes.render import render
from uae_jax.data.shapes.scene import MAX_OBJECTS, Scene, sample_scene, split_seed
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
        scenes: Callable[[int, int, int], list[Scene]],
    ):
        """
        Args:
          fields: (scenes, rng, step) -> further arrays [b, ...] of the batch.
          scenes: (seed, step, batch_size) -> scenes.
        """
        self.seed, self.batch_size, self.image_size = seed, batch_size, image_size
        self.fields, self.scenes = fields, scenes

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        scenes = self.scenes(self.seed, step, self.batch_size)
        images = np.stack([render(scene, self.image_size) for scene in scenes])
        return {"image": images} | self.fields(scenes, np.random.default_rng([self.seed, step, 1]), step)


def uniform_scenes(seed: int, step: int, batch_size: int) -> list[Scene]:
    """The next `batch_size` scenes of the training split."""
    return [sample_scene(split_seed(seed, "train"), step * batch_size + i) for i in range(batch_size)]


def growing_scenes(curriculum_steps: int) -> Callable[[int, int, int], list[Scene]]:
    """`uniform_scenes` with up to one object at first and up to all of them from the last quarter of the curriculum.

    Attributes are learned on single objects, counting and order later.
    """

    def scenes(seed: int, step: int, batch_size: int) -> list[Scene]:
        most = 1 + min(MAX_OBJECTS - 1, MAX_OBJECTS * step // max(curriculum_steps, 1))
        return [sample_scene(split_seed(seed, "train"), step * batch_size + i, most) for i in range(batch_size)]

    return scenes


def model_config(config: Any, name: str) -> Any:
    """The sizes of a model that starts from nothing: `config.models[name]` holds what its config.json will."""
    raw = config.models[name].to_dict()
    config_class = folder.ARCHITECTURES[folder.architecture(raw)].config
    return config_class.from_hf(raw)


def initial_state(key: jax.Array, params: Params, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), key, params, optimizer.init(params), jnp.int32(0))


def supervised_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema: float = 0.0
) -> Callable[[State, Any, dict[str, jax.Array]], tuple[State, Metrics]]:
    """One gradient step on `loss(params, frozen, batch, key) -> (loss, metrics)`.

    Args:
      ema: decay a step of the state's moving average; 0: it has none.
    """

    def step(state: State, frozen: Any, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if "image" in batch:
            batch = batch | {"image": batch["image"].astype(jnp.float32) / 255.0}
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, frozen, batch, key)
        state, norm, _ = apply_gradient(state, gradient, optimizer)
        if ema:
            averaged = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.ema, state.params)
            state = state.replace(ema=averaged)
        return state.replace(step=state.step + 1), metrics | {"grad_norm": norm, "bad_steps": state.bad_steps}

    return step
