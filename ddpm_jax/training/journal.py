"""Logs of a training run: metrics.jsonl, TensorBoard and, if enabled, Weights & Biases."""

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.files import read_json_lines, write_text

METRICS = "metrics.jsonl"


class _Board(Protocol):
    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Writes metrics by step. When a run resumes, entries after the step that it resumes from are removed first.

    Args:
      folder: the workdir.
      first_step: the step that the run resumes from.
      config: of the run.
    """

    def __init__(self, folder: Path, first_step: int, config: ConfigDict):
        path = folder / METRICS
        kept = [line for line in read_json_lines(path) if line.get("step", math.inf) <= first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._open_tensorboard = config.log.tensorboard
        self._folder, self._first_step = folder, first_step
        self._boards: list[_Board] = [_WandB(folder, config)] if config.log.wandb else []

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        if self._open_tensorboard:  # at the first step: importing PyTorch, if installed, takes seconds
            self._open_tensorboard = False
            self._boards.append(_TensorBoard(self._folder / "tensorboard", self._first_step + 1))
        for board in self._boards:
            board.write(step, values)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


class _TensorBoard:
    """A TensorBoard file, whose events from `first_step` on replace those in older files.

    tensorboardX's SummaryWriter would hold events back for minutes, in a thread that dies silently if the disk is full.
    """

    def __init__(self, folder: Path, first_step: int):
        with _absent("torch"):  # tensorboardX would import it, which takes seconds, for a type annotation
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # The default name has a resolution of seconds, and a second file of the same name would replace the first.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        self._write(first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step, summary=self._summary(value=scalars))

    def _write(self, step: int, **content: Any) -> None:
        self._events.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class _WandB:
    """A Weights & Biases run, which continues when the workdir's run resumes.

    It accepts each step only once, which suffices: a repeated step has the same metrics.
    """

    def __init__(self, folder: Path, config: ConfigDict):
        try:
            import wandb
        except ImportError:
            raise UserError("config.log.wandb needs the package wandb: pip install -e '.[wandb]'") from None
        name = folder / "wandb" / "run_id"
        if not name.exists():
            write_text(name, secrets.token_hex(8))
        try:
            self._run = wandb.init(
                project=config.log.wandb,
                id=name.read_text(),
                name=folder.resolve().name,
                dir=folder,
                config=config.to_dict(),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"Weights & Biases cannot be used: {first_line(error)}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()  # its service may write for a moment longer; the process waits for that at exit


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Makes imports of a module fail, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
