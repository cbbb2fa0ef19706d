"""A bounded queue and its one worker: the devices are one resource, and requests take turns at them."""

import collections
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from typing import Any

from ddpm_jax.runtime.errors import UserError, first_line


class FullError(Exception):
    """No place is left in the queue.

    Attributes:
      waiting: how many wait.
      seconds: until all of them are served; None: not known yet.
    """

    def __init__(self, waiting: int, seconds: float | None):
        super().__init__(waiting, seconds)
        self.waiting, self.seconds = waiting, seconds


class CancelledError(Exception):
    """Nobody waits for this task any more."""


class Task:
    """Work that waits for its turn, is done, and tells about it on the way.

    Args:
      work: called with the task when its turn has come; returns what the last event carries besides its state.
      calls: how often it will call the network, as far as that can be told beforehand.
      weight: of a call, in the time that the network takes for a batch.
      program: what it compiles, if no task before it had the same.
      changed: called, from any thread, whenever there is something to tell.
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
        self.first: tuple[float, int] | None = None  # when the program had run for the first time, and its calls
        self._events: collections.deque[dict[str, Any]] = collections.deque()

    def tell(self, state: str, **facts: Any) -> None:
        """Leaves an event for whoever waits."""
        if not self.cancelled:
            self._events.append({"state": state, **facts})
            self.changed()

    def events(self) -> list[dict[str, Any]]:
        """What has been told since the last time."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def progress(self, done: int, calls: int) -> None:
        """Notes how far the work is.

        Raises:
          CancelledError: nobody waits for it; the work is to let this through.
        """
        self.done, self.calls = done, calls
        self.first = self.first or (time.monotonic(), done)
        if self.cancelled:
            raise CancelledError


class Queue:
    """Tasks in the order of their arrival, and one thread that does them.

    A task's last event has the state "done" or "failed"; before it come "compiling" or "running", once, and what the
    work tells.

    Args:
      limit: how many may wait, besides the one that is being done.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._condition = threading.Condition()
        self._waiting: collections.deque[Task] = collections.deque()
        self._running: Task | None = None
        self._closed = False
        self._compiled: set[Hashable] = set()
        self._compile_seconds = 0.0  # of the last program that was new
        self._call_seconds: float | None = None  # of a call of weight 1
        self._thread = threading.Thread(target=self._work, name="queue", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises FullError if there is no place."""
        with self._condition:
            if len(self._waiting) + (self._running is not None) > self.limit:
                raise FullError(len(self._waiting), self._seconds([*self._waiting]))

    def submit(self, task: Task) -> None:
        """Gives a task its place.

        Raises:
          FullError: there is none.
          UserError: the queue is closed.
        """
        with self._condition:
            if self._closed:
                raise UserError("the playground is ending")
            self.check()
            self._waiting.append(task)
            self._condition.notify()

    def place(self, task: Task) -> tuple[int, float | None] | None:
        """How many tasks come before it and in how many seconds, if that is known, they are done; None: it is its
        turn."""
        with self._condition:
            if task not in self._waiting:
                return None
            before = [*self._waiting][: self._waiting.index(task)]
            return len(before) + (self._running is not None), self._seconds(before)

    def cancel(self, task: Task) -> None:
        """Leaves the task, or the rest of it, undone."""
        with self._condition:
            task.cancelled = True
            if task in self._waiting:
                self._waiting.remove(task)

    def close(self) -> None:
        """Lets no more tasks in, ends those that wait, and the one that is being done at its next call."""
        with self._condition:
            self._closed = True
            tasks = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._condition.notify()
        for task in tasks:
            task.tell("failed", error="the playground is ending")
            task.cancelled = True

    def join(self) -> None:
        """Waits for the worker of a closed queue."""
        self._thread.join()

    def _seconds(self, tasks: list[Task]) -> float | None:
        """What these and the rest of the running one take."""
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
                told = {"state": "failed", "error": "nobody waits for this"}
            except UserError as error:
                told = {"state": "failed", "error": str(error)}
            except Exception as error:  # such as too little memory on the device
                traceback.print_exc()
                told = {"state": "failed", "error": f"computing this failed: {first_line(error)}"}
            if task.first is not None:
                self._learn(task, began, *task.first)
            task.tell(**told)

    def _learn(self, task: Task, began: float, first: float, calls: int) -> None:
        """What the time that a task took says about the next."""
        with self._condition:
            if task.done > calls:
                seconds = (time.monotonic() - first) / (task.done - calls) / task.weight
                old = seconds if self._call_seconds is None else self._call_seconds
                self._call_seconds = (old + seconds) / 2
            if task.program not in self._compiled:
                self._compiled.add(task.program)
                self._compile_seconds = first - began
