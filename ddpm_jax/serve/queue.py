"""A bounded queue with a single worker: requests take turns on the devices."""

import collections
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from typing import Any

from ddpm_jax.runtime.errors import UserError, first_line


class FullError(Exception):
    """The queue is full.

    Attributes:
      waiting: number of waiting tasks.
      seconds: until all of them are done; None: not known yet.
    """

    def __init__(self, waiting: int, seconds: float | None):
        super().__init__(waiting, seconds)
        self.waiting, self.seconds = waiting, seconds


class CancelledError(Exception):
    """This task was cancelled."""


class Task:
    """A unit of work that waits for its turn and reports its progress.

    Args:
      work: called with the task when its turn has come; returns the contents of the last event besides its state.
      calls: estimated number of network calls.
      weight: duration of a call, in units of the network's time for a batch.
      program: identifies the program that it compiles if no earlier task had the same.
      changed: called, from any thread, when there are new events or progress.
    """

    def __init__(
        self,
        work: Callable[["Task"], dict[str, Any]],
        calls: int,
        weight: float,
        program: Hashable,
        changed: Callable[[], None],
    ):
        self.work, self.calls, self.weight, self.program, self.changed = work, calls, weight, program, changed
        self.done = 0
        self.cancelled = False
        self.first: tuple[float, int] | None = None  # time and calls done after the program's first run
        self._events: collections.deque[dict[str, Any]] = collections.deque()

    def tell(self, state: str, **facts: Any) -> None:
        """Adds an event."""
        if not self.cancelled:
            self._events.append({"state": state, **facts})
            self.changed()

    def events(self) -> list[dict[str, Any]]:
        """Takes the events since the last call."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def progress(self, done: int, calls: int) -> None:
        """Records the progress of the work.

        Raises:
          CancelledError: the task was cancelled; the work must not catch this.
        """
        self.done, self.calls = done, calls
        self.first = self.first or (time.monotonic(), done)
        if self.cancelled:
            raise CancelledError


class Queue:
    """Tasks in order of arrival, and one thread that runs them.

    A task's last event has the state "done" or "failed"; before that come one "compiling" or "running" event and the
    work's own events.

    Args:
      limit: how many tasks may wait, besides the running one.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._condition = threading.Condition()
        self._waiting: collections.deque[Task] = collections.deque()
        self._running: Task | None = None
        self._closed = False
        self._compiled: set[Hashable] = set()
        self._compile_seconds = 0.0  # for the last new program
        self._call_seconds: float | None = None  # of a call of weight 1
        self._thread = threading.Thread(target=self._work, name="queue", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises FullError if the queue is full."""
        with self._condition:
            if len(self._waiting) + (self._running is not None) > self.limit:
                raise FullError(len(self._waiting), self._seconds([*self._waiting]))

    def submit(self, task: Task) -> None:
        """Adds a task.

        Raises:
          FullError: the queue is full.
          UserError: the queue is closed.
        """
        with self._condition:
            if self._closed:
                raise UserError("the playground is shutting down")
            self.check()
            self._waiting.append(task)
            self._condition.notify()

    def place(self, task: Task) -> tuple[int, float | None] | None:
        """The number of tasks before this one and the seconds until they are done, if known; None: it is its turn."""
        with self._condition:
            if task not in self._waiting:
                return None
            before = [*self._waiting][: self._waiting.index(task)]
            return len(before) + (self._running is not None), self._seconds(before)

    def cancel(self, task: Task) -> None:
        """Cancels the task, even if it is running."""
        with self._condition:
            task.cancelled = True
            if task in self._waiting:
                self._waiting.remove(task)

    def close(self) -> None:
        """Stops accepting tasks, cancels those that wait, and stops the running one at its next call."""
        with self._condition:
            self._closed = True
            tasks = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._condition.notify()
        for task in tasks:
            task.tell("failed", error="the playground is shutting down")
            task.cancelled = True

    def join(self) -> None:
        """Waits for the worker of a closed queue."""
        self._thread.join()

    def _seconds(self, tasks: list[Task]) -> float | None:
        """The time that these tasks and the rest of the running one take."""
        if self._call_seconds is None:
            return None
        seconds = 0.0
        for task in [self._running, *tasks] if self._running else tasks:
            compiling = task.first is None and task.program not in self._compiled
            seconds += (task.calls - task.done) * task.weight * self._call_seconds + compiling * self._compile_seconds
        return seconds

    def _work(self) -> None:
        while True:
            with self._condition:
                self._running = None
                while not self._waiting:
                    if self._closed:
                        return
                    self._condition.wait()
                task = self._running = self._waiting.popleft()
            began = time.monotonic()
            task.tell("running" if task.program in self._compiled else "compiling")
            try:
                told = {"state": "done", **task.work(task)}
            except CancelledError:
                told = {"state": "failed", "error": "cancelled"}
            except UserError as error:
                told = {"state": "failed", "error": str(error)}
            except Exception as error:  # such as insufficient memory on the device
                traceback.print_exc()
                told = {"state": "failed", "error": f"computing this failed: {first_line(error)}"}
            if task.first is not None:
                self._learn(task, began, *task.first)
            task.tell(**told)

    def _learn(self, task: Task, began: float, first: float, calls: int) -> None:
        """Updates the time estimates from a finished task."""
        with self._condition:
            if task.done > calls:
                seconds = (time.monotonic() - first) / (task.done - calls) / task.weight
                old = seconds if self._call_seconds is None else self._call_seconds
                self._call_seconds = (old + seconds) / 2
            if task.program not in self._compiled:
                self._compiled.add(task.program)
                self._compile_seconds = first - began
