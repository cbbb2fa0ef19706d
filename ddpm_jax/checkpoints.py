"""Checkpoints of a workdir, with Orbax: written in the background, whole or not at all, each of several parts.

The parts are "train" (step, optimiser state, loss history), "params", and one a moving average, "ema_0.9999", so that
sampling reads the weights it uses and nothing else.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from ddpm_jax.errors import UserError, first_line
from ddpm_jax.training.state import Params, TrainState


def _parts(state: TrainState) -> dict[str, Any]:
    train = {"step": state.step, "opt_state": state.opt_state, "history": state.history}
    return {"train": train, "params": state.params} | {f"ema_{decay}": ema for decay, ema in state.ema.items()}


class Checkpoints:
    """The checkpoints under `workdir`/checkpoints.

    Args:
      workdir: of the run.
      keep: how many of the newest stay; None: all.
      read_only: make and remove nothing, so that a run that is being trained can be read.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        self.directory = Path(workdir).resolve() / "checkpoints"
        verbosity = logging.get_verbosity()
        if read_only:
            logging.set_verbosity(logging.ERROR)  # Orbax warns of what it was told
        try:
            self._manager = ocp.CheckpointManager(
                epath.Path(self.directory),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only, read_only=read_only
                ),
            )
        finally:
            logging.set_verbosity(verbosity)

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state off the devices, then writes it in the background; a step that is there stays."""
        if step not in self._manager.all_steps():
            parts = {name: ocp.args.StandardSave(part) for name, part in _parts(state).items()}
            self._manager.save(step, args=ocp.args.Composite(**parts), force=True)

    def reached_preemption(self, step: int) -> bool:
        """Whether any process of a multi-host job was told to stop; the same answer on all."""
        return self._manager.reached_preemption(step)

    def restore_latest(self, state: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint that can be read, or None if there is none.

        Ones that cannot are said aloud and set aside in `workdir`/corrupt.

        Args:
          state: the shapes, dtypes and shardings wanted (`jax.ShapeDtypeStruct`s).

        Raises:
          UserError: there are checkpoints, but not one can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                parts = {name: ocp.args.StandardRestore(part) for name, part in _parts(state).items()}
                restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
            except Exception as error:  # Orbax and TensorStore raise many kinds
                self._set_aside(step, error)
                continue
            train = restored["train"]
            return step, TrainState(
                step=train["step"],
                params=restored["params"],
                ema={decay: restored[f"ema_{decay}"] for decay in state.ema},
                opt_state=train["opt_state"],
                history=train["history"],
            )
        if steps:
            raise UserError(f"none of the {len(steps)} checkpoints in {self.directory} can be read")
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = self.directory.parent / "corrupt" / str(step)
        logging.error(
            "Checkpoint %d cannot be read (%s); it is moved to %s and the one before it is used.",
            step,
            first_line(error)[:200],
            aside,
        )
        if jax.process_index() == 0:
            aside.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.move(self.directory / str(step), aside)
        self._manager.reload()

    def restore_weights(self, step: int | None, part: str, params: Params) -> tuple[int, Params]:
        """One part's weights ("params" or "ema_...") and their step; nothing is moved or written.

        Args:
          step: of the checkpoint; None: the newest that can be read.
          part: which weights.
          params: the shapes, dtypes and shardings wanted.

        Raises:
          UserError: no such checkpoint, or none that can be read.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory.parent} has no checkpoint yet")
        if step is not None and step not in steps:
            raise UserError(f"{self.directory.parent} has no checkpoint of step {step}; it has {steps}")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                args = ocp.args.Composite(**{part: ocp.args.StandardRestore(params)})
                return candidate, self._manager.restore(candidate, args=args)[part]
            except Exception as error:  # Orbax and TensorStore raise many kinds
                logging.error("Checkpoint %d cannot be read: %s", candidate, first_line(error)[:200])
        raise UserError(f"no checkpoint in {self.directory} can be read")

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
