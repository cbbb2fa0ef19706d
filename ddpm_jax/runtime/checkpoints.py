"""Checkpoints of a workdir, with Orbax: written in the background, atomically, in several parts.

The parts are "train" (step, optimiser state, loss history), "params", one part per moving average such as "ema_0.9999",
so that sampling reads only the weights it uses, and "unreported", the metric sums not yet written to metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from ddpm_jax.runtime import memory
from ddpm_jax.runtime.errors import UserError, first_line

if TYPE_CHECKING:  # the foundations do not depend on the training
    from ddpm_jax.training.state import Params, TrainState
    from ddpm_jax.training.step import Metrics

_HALF_WRITTEN = ".orbax-checkpoint-tmp"


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Orbax asks for this from another thread, for its statistics, which would disturb jax's step count."""
        return False


def newest_step(workdir: str | Path) -> int | None:
    """The step of the newest complete checkpoint, from the folders' names alone."""
    return max((int(path.name) for path in Path(workdir).glob("checkpoints/*") if path.name.isdigit()), default=None)


def _parts(state: TrainState) -> dict[str, Any]:
    train = {"step": state.step, "opt_state": state.opt_state, "history": state.history}
    return {"train": train, "params": state.params} | {f"ema_{decay}": ema for decay, ema in state.ema.items()}


def _one_copy(part: Any) -> Any:
    """The part with one device's copy of each replicated array, if there is a single process.

    Orbax would save a slice from each copy, and JAX would compile a program for each shape to cut it out, which takes
    seconds even for a small network.
    """
    if jax.process_count() > 1:
        return part
    return jax.tree.map(lambda x: x.addressable_data(0) if x.is_fully_replicated else x, part)


class Checkpoints:
    """The checkpoints under `workdir`/checkpoints.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints to keep; None: all.
      read_only: create and remove nothing, so that a run can be read while it trains.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        self.directory = Path(workdir).resolve() / "checkpoints"
        self._is_saving = False
        verbosity = logging.get_verbosity()
        if read_only:
            logging.set_verbosity(logging.ERROR)  # Orbax warns about options that are set on purpose
        elif jax.process_index() == 0:
            for path in self.directory.glob(f"*{_HALF_WRITTEN}*"):
                logging.warning(
                    "Checkpoint %s was half-written when the run was interrupted; removing it.", path.name.split(".")[0]
                )
        try:
            self._manager = _Manager(
                epath.Path(self.directory),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only, read_only=read_only
                ),
            )
        except OSError as error:
            raise UserError(f"{self.directory} cannot be used: {first_line(error)}") from None
        finally:
            logging.set_verbosity(verbosity)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, unreported: Metrics | None = None) -> None:
        """Copies the state off the devices, then writes it in the background; does nothing if the step exists.

        Raises:
          UserError: this or the previous checkpoint cannot be written; older ones are intact.
        """
        if step not in self._manager.all_steps():
            parts = _parts(state) | ({} if unreported is None else {"unreported": unreported})
            saved = {name: ocp.args.StandardSave(_one_copy(part)) for name, part in parts.items()}
            args = ocp.args.Composite(**saved)
            with self._in_a_sentence():
                self._manager.save(step, args=args, force=True)
            self._is_saving = True

    def save_weights(self, step: int, params: Params) -> None:
        """Writes only weights, as "params", for sampling but not for resuming; see `save`."""
        with self._in_a_sentence():
            self._manager.save(
                step, args=ocp.args.Composite(params=ocp.args.StandardSave(_one_copy(params))), force=True
            )
        self._is_saving = True

    def check(self) -> None:
        """UserError if writing in the background has failed; does not wait."""
        if self._is_saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written; UserError if it cannot be."""
        self._is_saving = False
        with self._in_a_sentence():
            self._manager.wait_until_finished()

    @contextmanager
    def _in_a_sentence(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds of errors
            cause = _system_error(error)
            if cause is None:
                raise
            step = newest_step(self.directory.parent)
            older = "there is no earlier checkpoint" if step is None else f"the checkpoint of step {step} is intact"
            raise UserError(
                f"a checkpoint could not be written to {self.directory} ({cause}); {older}; once the problem is fixed, "
                "the same command resumes"
            ) from None

    def restore_latest(self, state: TrainState) -> tuple[int, TrainState] | None:
        """Restores the newest readable checkpoint; returns None if there are no checkpoints.

        Unreadable checkpoints are reported and moved to `workdir`/corrupt, but only if an older one can be read: if
        none can, the cause may be temporary.

        Args:
          state: the desired shapes, dtypes and shardings (`jax.ShapeDtypeStruct`s).

        Raises:
          UserError: there are checkpoints, but none can be read.
        """
        unreadable: list[tuple[int, Exception]] = []
        for step in reversed(self.steps()):
            try:
                parts = {name: ocp.args.StandardRestore(part) for name, part in _parts(state).items()}
                restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
            except Exception as error:  # Orbax and TensorStore raise many kinds of errors
                unreadable.append((step, error))
                continue
            for newer, why in unreadable:
                self._set_aside(newer, why)
            train = restored["train"]
            return step, dataclasses.replace(
                state,
                step=train["step"],
                params=restored["params"],
                ema={decay: restored[f"ema_{decay}"] for decay in state.ema},
                opt_state=train["opt_state"],
                history=train["history"],
            )
        if unreadable:
            raise UserError(
                f"none of the {len(unreadable)} checkpoints in {self.directory} can be read; the newest: "
                f"{first_line(unreadable[0][1])}"
            )
        return None

    def restore_unreported(self, step: int, metrics: Metrics) -> Metrics | None:
        """The metric sums saved with a step, in these shapes, or None."""
        if not (self.directory / str(step) / "unreported").exists():
            return None
        args = ocp.args.Composite(unreported=ocp.args.StandardRestore(metrics))
        return self._manager.restore(step, args=args)["unreported"]

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.directory.parent / "corrupt" / str(step)
        logging.error(
            "Checkpoint %d cannot be read (%s); moving it to %s and using the previous one.",
            step,
            first_line(error)[:200],
            aside,
        )
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(self.directory / str(step), aside)
        multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._manager.reload()

    def restore_weights(self, step: int | None, part: str, params: Params) -> tuple[int, Params]:
        """Reads one part's weights ("params" or "ema_...") and their step; nothing is moved or written.

        Args:
          step: of the checkpoint; None: the newest readable one.
          part: which weights.
          params: the desired shapes, dtypes and shardings.

        Raises:
          UserError: no such checkpoint, or none that can be read.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory.parent} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{self.directory.parent} has no checkpoint of step {step}; accepted: {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                # A handler that reads a gigabyte at a time: the default temporarily needs twice the weights' memory.
                with ocp.Checkpointer(ocp.StandardCheckpointHandler(restore_concurrent_gb=1)) as reader:
                    path = self.directory / str(candidate) / part
                    found = reader.restore(path, args=ocp.args.StandardRestore(params))
                memory.return_freed_memory()
                return candidate, found
            except Exception as error:  # Orbax and TensorStore raise many kinds of errors
                logging.error("Checkpoint %d cannot be read: %s", candidate, first_line(error)[:200])
        raise UserError(f"no checkpoint in {self.directory} can be read")

    def close(self) -> None:
        """Waits until everything is written."""
        self.wait()
        self._manager.close()


def read_weights(workdir: str | Path, part: str, shapes: Params) -> Params:
    """Reads one part's weights from the newest checkpoint as NumPy arrays, whatever devices they were trained on.

    Args:
      workdir: of the run.
      part: "params" or "ema_...".
      shapes: of the weights, with their dtypes.

    Raises:
      UserError: as for `Checkpoints.restore_weights`.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return jax.device_get(checkpoints.restore_weights(None, part, shapes)[1])
    finally:
        checkpoints.close()


def _system_error(error: Exception) -> str | None:
    """The operating system's message in an error of Orbax or TensorStore; None for other errors."""
    texts = [os.strerror(number) for number in errno.errorcode]
    found = [text for text in texts if text in str(error)]
    return max(found, key=len, default=first_line(error) if isinstance(error, OSError) else None)
