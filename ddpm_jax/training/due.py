"""What is due after a step of training: logging, saving, sampling, evaluating, stopping."""

import dataclasses
import threading
import time

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ddpm_jax.runtime import processes


@dataclasses.dataclass(frozen=True)
class Due:
    """What to do after a step."""

    stop: bool
    log: bool
    save: bool
    sample: bool
    evaluate: bool


class Calendar:
    """Says what is due; the same on all processes of a job.

    Args:
      config: of the run, with the intervals.
      stop: is set once this process has got a signal to stop.
    """

    def __init__(self, config: ConfigDict, stop: threading.Event):
        self._config, self._stop = config, stop
        self._dispatches, self._last_save = 0, time.monotonic()

    def after(self, before: int, step: int) -> Due:
        """What is due after the steps in (before, step], which one dispatch has made."""
        config = self._config
        stop, is_last = self._is_stopping(), step == config.train.num_steps
        log = is_last or is_passed(before, step, config.log.every_steps)
        save = stop or is_last or is_passed(before, step, config.checkpoint.every_steps)
        return Due(
            stop=stop,
            log=log,
            save=save or (log and self._are_minutes_passed()),
            sample=not is_last and is_passed(before, step, config.log.sample_every_steps),
            evaluate=is_passed(before, step, config.evaluate.every_steps),
        )

    def saved(self) -> None:
        """To be called after a checkpoint, from which checkpoint.every_minutes counts."""
        self._last_save = time.monotonic()

    def _is_stopping(self) -> bool:
        """Whether this process, or any of a multi-host job, got a signal to stop."""
        if jax.process_count() == 1:
            return self._stop.is_set()
        self._dispatches += 1  # jax requires a number that increases by one
        return multihost_utils.reached_preemption_sync_point(self._dispatches)

    def _are_minutes_passed(self) -> bool:
        """Whether checkpoint.every_minutes have passed by process 0's clock."""
        every = self._config.checkpoint.every_minutes
        if not every:
            return False
        with jax.transfer_guard("allow"):
            return processes.agree(time.monotonic() - self._last_save >= 60 * every)


def is_passed(before: int, step: int, every: int) -> bool:
    """Whether there is a multiple of `every` in (before, step]; never for 0."""
    return every > 0 and step // every > before // every
