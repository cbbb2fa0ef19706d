"""What a run says of itself on the way: metrics.jsonl, TensorBoard and, if it is told to, Weights & Biases."""

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
    """Writes numbers by step; what lies beyond the step that a run goes on from is written anew.

    Args:
      folder: the workdir.
      first_step: that the run goes on from.
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
        if self._open_tensorboard:  # not before the first step: it imports PyTorch where that is installed, for seconds
            self._open_tensorboard = False
            self._boards.append(_TensorBoard(self._folder / "tensorboard", self._first_step + 1))
        for board in self._boards:
            board.write(step, values)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()


class _TensorBoard:
    """A file of TensorBoard's, in which events from `first_step` on take the place of those in older files.

    tensorboardX's SummaryWriter would keep the events for minutes, in a thread that a full disk ends unseen.
    """

    def __init__(self, folder: Path, first_step: int):
        with _absent("torch"):  # tensorboardX would import it, which takes seconds, for a type annotation
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        # Its own name for the file has whole seconds, and a second file of that name would replace the first.
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
    """A run of Weights & Biases', the same one whenever the workdir's run goes on.

    It takes no step twice, and needs to take none: a step that is made again has the same numbers.
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
                f"Weights & Biases cannot be used: {first_line(error)}; `wandb login` once, or set WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()  # its service may write for a moment longer; the end of the process waits for that


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Lets imports of a module fail, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
