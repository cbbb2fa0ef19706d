"""The values of a line of metrics: speed and means over the steps since the previous line."""

import sys
import time

import jax

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.batches import Waited
from ddpm_jax.training.step import Metrics


class DivergedError(UserError):
    """The loss or the gradient of a training step was not finite."""


class Interval:
    """The time since the previous line.

    Args:
      step: the last one before the interval.
      batch_size: images per step.
      batches: the iterator that the loop waits for.
    """

    def __init__(self, step: int, batch_size: int, batches: Waited):
        self._batch_size, self._batches = batch_size, batches
        self.begin(step)

    def begin(self, step: int) -> None:
        self._began, self._step, self._batches.waited = time.monotonic(), step, 0.0

    def speed(self, step: int) -> dict[str, float]:
        """The speed from the beginning of the interval to this step."""
        seconds = time.monotonic() - self._began
        steps_per_second = (step - self._step) / seconds
        return {
            "steps_per_second": steps_per_second,
            "images_per_second": steps_per_second * self._batch_size,
            "input_wait": self._batches.waited / seconds,
        }


def means(metrics: Metrics) -> dict[str, float]:
    """The means of the summed metrics; DivergedError if a step was not finite."""
    if metrics.bad_step >= 0:
        raise DivergedError(
            f"training diverged at step {int(metrics.bad_step) + 1}: loss {float(metrics.bad_loss):g}, gradient norm "
            f"{float(metrics.bad_grad_norm):g}; the last good checkpoint is kept (a lower optimizer.learning_rate, a "
            "longer warm-up or float32 may help)"
        )
    steps = float(metrics.steps)
    if not steps:
        return {}
    quarters = {
        f"loss_t_quarter_{i + 1}": float(total / count)
        for i, (total, count) in enumerate(zip(metrics.quarter_loss, metrics.quarter_count, strict=True))
        if count
    }
    return {"loss": float(metrics.loss) / steps, **quarters, "grad_norm": float(metrics.grad_norm) / steps}


def memory() -> dict[str, float]:
    """The peak memory of the first device in GiB; on CPUs that of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return {"peak_memory_gib": stats["peak_bytes_in_use"] / 2**30}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
