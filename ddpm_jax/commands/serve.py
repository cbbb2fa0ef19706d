"""A page in the browser to play with a run."""

import importlib.util
import signal
import socket

import jax

from ddpm_jax.commands.job import Job
from ddpm_jax.runtime.errors import UserError

_BATCH_SIZE = 8
_PACKAGES = ("starlette", "uvicorn", "python_multipart")


def serve(job: Job, *, host: str, port: int, queue: int, batch_size: int | None) -> None:
    """Serves the playground until SIGINT or SIGTERM.

    Args:
      job: the run.
      host, port: to listen at; port 0: one that is free.
      queue: requests that may wait.
      batch_size: images of a request at most; None: 8.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--mode=serve needs {', '.join(missing)}, which is not installed: pip install -e '.[serve]'")
    job.check_pictures()
    if jax.process_count() > 1:
        raise UserError("--mode=serve runs in one process; leave out what starts several")
    from ddpm_jax.serve.actions import Playground
    from ddpm_jax.serve.app import is_loopback, make_app
    from ddpm_jax.serve.queue import Queue
    from ddpm_jax.serve.server import Server

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port} cannot be listened at: {error.strerror}") from None
    playground = Playground(job.run, job.folder.resolve().name, batch_size or _BATCH_SIZE)
    waiting = Queue(queue)
    address = f"[{host}]" if ":" in host else host
    print(f"{job.run.weights}: http://{address}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
    if playground.without_source:
        print(f"without training images: {playground.without_source}", flush=True)
    if not is_loopback(host):
        print("whoever reaches this machine can use it: there is no password", flush=True)
    # The server has handlers of its own, and calls these once it has ended.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(make_app(playground, waiting, host), waiting).run([listening])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    waiting.join()
    print("the playground has ended", flush=True)
