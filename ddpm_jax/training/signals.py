"""Stopping a run by signals."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets; a second signal has its usual effect.

    In a multi-host job jax handles SIGTERM and notifies the other processes, and Ctrl-C is turned into a SIGTERM.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    alone = jax.process_count() == 1
    previous: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, previous[number])
        if not alone:
            signal.raise_signal(signal.SIGTERM)

    for number in (int(signal.SIGINT), *([int(signal.SIGTERM)] if alone else [])):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
