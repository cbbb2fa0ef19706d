"""Starts and stops the processes of a multi-host job together, with a message that says why.

jax stops a job whose process died, but late and with an obscure message, and a collective may wait for the dead process
forever. So every process writes heartbeats to the job's key-value store and watches those of the others.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax._src import distributed  # the key-value store has no public name
from jax.experimental import multihost_utils

from ddpm_jax.runtime.errors import UserError, first_line

_ALIVE, _STOPPED = "ddpm_jax/alive", "ddpm_jax/stopped"
_WEEK_MS = 7 * 24 * 3600 * 1000


@contextmanager
def job(
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    automatic: bool = False,
    start_timeout: int = 300,
    silence_timeout: int = 60,
    advice: Callable[[], str] = lambda: "start the same command on every host again",
) -> Iterator[None]:
    """Joins the processes of a multi-host job for the duration of the block; does nothing for a single process.

    If one process's block ends with an error, or a process dies, all of them end: each prints one sentence and exits
    with status 1.

    Args:
      coordinator: "host:port" of process 0; "": JAX_COORDINATOR_ADDRESS if automatic.
      num_processes, process_id: number of processes, and the index of this one; None: JAX_NUM_PROCESSES and
        JAX_PROCESS_ID if automatic.
      automatic: take missing values from the environment (TPU pod, Slurm, Open MPI, Kubernetes, or these variables).
      start_timeout: seconds within which all processes must have joined.
      silence_timeout: seconds without a heartbeat after which a process counts as gone.
      advice: what to do after the job has stopped.

    Raises:
      UserError: the arguments do not fit, or process 0 cannot be reached.
    """
    if automatic:
        environment = os.environ.get
        coordinator = coordinator or environment("JAX_COORDINATOR_ADDRESS", "")
        num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
        process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    elif not coordinator:
        if num_processes is not None or process_id is not None:
            raise UserError("--num_processes and --process_id also need --coordinator=host:port")
        yield
        return
    if not automatic or None not in (num_processes, process_id):
        _check(coordinator, num_processes, process_id)
        _find_coordinator(coordinator, process_id, start_timeout)
    _last_word.say = lambda: f"not all processes of the job joined within {start_timeout} s; {advice()}"
    _last_word.listen()
    try:
        jax.distributed.initialize(
            coordinator or None,
            num_processes,
            process_id,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=2 * silence_timeout,  # so that the watch here is first
        )
    except (ValueError, RuntimeError, OSError) as error:  # nothing usable found
        found = f"could not start a job ({first_line(error)})"
        if not automatic:
            raise UserError(
                f"--coordinator {coordinator} {found}; it needs the host and a free port of process 0, and on every "
                "process --num_processes and its own --process_id"
            ) from None
        raise UserError(
            f"--distributed {found}; it needs a TPU pod, Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID; otherwise use --coordinator, --num_processes and --process_id"
        ) from None
    peers = _Peers(silence_timeout, advice)
    try:
        yield
    except BaseException as error:
        peers.end_with(error)
    else:
        peers.end()


def agree(mine: bool) -> bool:
    """The value of process 0, on all processes."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(mine)))


def meet(name: str) -> None:
    """Waits for all processes of the job to reach this point, however long they take; each name works once."""
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(f"ddpm_jax/{name}", _WEEK_MS)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment's {variable} is {text!r}, which is not a number") from None


def _check(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator is {coordinator!r}; accepted: host:port of process 0")
    if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UserError(
            f"--coordinator needs --num_processes of 1 or more and --process_id below it, "
            f"not {num_processes} and {process_id}"
        )


def _find_coordinator(coordinator: str, process_id: int | None, timeout: int) -> None:
    """UserError if process 0 cannot be reached in time, or cannot open its port; jaxlib would abort."""
    host, _, port = coordinator.rpartition(":")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"--coordinator={coordinator}: process 0 cannot open port {port}: {error}") from None
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator={coordinator}: process 0 did not respond for {timeout} s ({error}); is it running, "
                    "and can this host reach that port?"
                ) from None
        time.sleep(0.2)


class _LastWord:
    """The message to print if jaxlib aborts the process, which it does from its own thread when another process dies.

    jaxlib accepts a Python callback for this, but fails to call it.
    """

    def __init__(self) -> None:
        self.say: Callable[[], str] = lambda: ""
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)

    def listen(self) -> None:
        if sys.platform != "win32":
            # signal.signal's handlers run in the main thread, which would be too late.
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)

    def _handle(self, number: int) -> None:
        sentence = self.say()
        if sentence:
            _leave(sentence)


_last_word = _LastWord()


def _leave(sentence: str) -> None:
    """Ends the process immediately: anything else may wait for a process that is gone."""
    sys.stdout.flush()
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()
    os._exit(1)


class _Peers:
    """Watches the other processes of the job."""

    def __init__(self, timeout: float, advice: Callable[[], str]):
        self.index, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        self.timeout, self.interval, self.advice = timeout, min(2.0, timeout / 5), advice
        assert distributed.global_state.client is not None
        self.client = distributed.global_state.client
        _last_word.say = self._why_aborted
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Waits until all processes are done."""
        meet("end")
        self._ended.set()
        self._thread.join()
        jax.distributed.shutdown()
        _last_word.say = lambda: ""

    def end_with(self, error: BaseException) -> None:
        """Reports the error to the others; does not return."""
        if not isinstance(error, UserError | KeyboardInterrupt):
            # The error may be due to another process's end, which the watch finds and names.
            time.sleep(self.timeout + 3 * self.interval)
            traceback.print_exception(error)
        self._ended.set()
        sentence = first_line(error)
        self.client.key_value_set(f"{_STOPPED}/{self.index}", sentence, allow_overwrite=True)
        self._let_others_read()
        _leave(sentence)

    def _watch(self) -> None:
        beat, start = 0, time.monotonic()
        last: dict[int, tuple[str, float]] = {}  # the latest heartbeat, and when it was seen
        while not self._ended.wait(self.interval):
            beat += 1
            try:
                self.client.key_value_set(f"{_ALIVE}/{self.index}", str(beat), allow_overwrite=True)
                stopped = dict(self.client.key_value_dir_get(_STOPPED))
                alive = {int(key.rsplit("/", 1)[1]): value for key, value in self.client.key_value_dir_get(_ALIVE)}
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone, and jaxlib is about to abort
            now = time.monotonic()
            last |= {i: (value, now) for i, value in alive.items() if last.get(i, ("", 0))[0] != value}
            stopped.pop(f"{_STOPPED}/{self.index}", None)
            if stopped:
                key, sentence = min(stopped.items())
                self._stop(f"process {key.rsplit('/', 1)[1]} of {self.count} stopped: {sentence}")
            silent = [i for i in range(self.count) if now - last.get(i, ("", start))[1] > self.timeout]
            if silent:
                self._stop(self._gone(silent[0], f"no heartbeat for {self.timeout:g} s"))

    def _stop(self, sentence: str) -> None:
        if self._ended.is_set():
            return
        self._let_others_read()
        _leave(sentence)

    def _let_others_read(self) -> None:
        """Process 0 keeps the store, so it exits last."""
        if self.index == 0:
            time.sleep(3 * self.interval)

    def _gone(self, index: int, why: str) -> str:
        return f"process {index} of {self.count} is gone ({why}), so process {self.index} stops too; {self.advice()}"

    def _why_aborted(self) -> str:
        host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            return self._gone(0, error.strerror or "no answer")
        time.sleep(self.timeout + 3 * self.interval)  # gloo aborts if a process is gone, which the watch then names
        return ""
