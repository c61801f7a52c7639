"""What can be trained, each as a `Program` for the outer loop: the supervised cold start, and RL."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from uae_jax.gap import Watch
from uae_jax.sharding import Rules
from uae_jax.step import Metrics, State


class Batches(Protocol):
    """Batches by step: a pure function of (seed, step)."""

    def __getitem__(self, step: int) -> dict[str, Any]: ...


class Program(NamedTuple):
    """One stage: where it starts, what a step is, what it reads, and what follows."""

    state: State
    frozen: Any
    rules: Rules  # where the state's and the frozen parameters lie on the mesh
    step: Callable[[State, Any, dict[str, jax.Array]], tuple[State, Metrics]]  # pure; the loop compiles it
    batches: Batches
    steps: int
    columns: dict[str, tuple[str, str]]  # metric -> (label, format) for the terminal
    # (state, writer) -> further metrics of the step; at step 0, every config.eval.every steps, and at the last
    evaluate: Callable[[State, Any], Metrics]
    finish: Callable[[State, Any], None]  # (state, writer), after the last step: tables, weights
    # metrics of all steps so far -> further ones of the last, and why to stop, if so
    watch: Watch = lambda rows: ({}, None)
