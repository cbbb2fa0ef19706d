"""The training step, compiled while the run's state is made or read."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from ddpm_jax.training.state import TrainState
from ddpm_jax.training.step import Batch, Metrics


class CompiledStep:
    """A training step that is traced at once, and then compiled by a thread.

    On GPUs `wait` compiles it: XLA chooses kernels by timing them, when nothing else should keep the GPU busy.

    Args:
      train_step: from `make_train_step`.
      arguments: to compile it for, from `step_arguments`. The dispatches at the start and at the end of a run may have
        fewer steps, and the step is compiled again when the first of them comes.
    """

    def __init__(self, train_step: jax.stages.Wrapped, arguments: tuple[Any, ...]):
        self._train_step, self._length = train_step, length(arguments[-1])
        began = time.monotonic()
        lowered = train_step.lower(*arguments)
        self._seconds = time.monotonic() - began
        self._finish: Callable[[], tuple[jax.stages.Compiled, float]]
        if jax.default_backend() == "gpu":
            self._finish = partial(_compile, lowered)
        else:
            thread = ThreadPoolExecutor(1, "compile")
            self._finish = thread.submit(_compile, lowered).result
            thread.shutdown(wait=False)

    def wait(self) -> float:
        """Waits until it is compiled; returns the seconds that tracing and compiling took."""
        self._compiled, seconds = self._finish()
        del self._finish  # and the traced program with it
        return self._seconds + seconds

    def __call__(self, state: TrainState, metrics: Metrics, batch: Batch) -> tuple[TrainState, Metrics]:
        step = self._compiled if length(batch) == self._length else self._train_step
        found: tuple[TrainState, Metrics] = step(state, metrics, batch)
        return found


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    began = time.monotonic()
    return lowered.compile(), time.monotonic() - began


def length(batch: Batch) -> int:
    """The length of the first axis."""
    return len(jax.tree.leaves(batch)[0])
