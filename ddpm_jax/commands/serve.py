"""The playground: a page in the browser that draws with a run."""

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
      host, port: the address to listen on; port 0: any free port.
      queue: how many requests may wait.
      batch_size: the most images of one request; None: 8.
    """
    missing = missing_packages()
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"--mode=serve needs {', '.join(missing)}, which {are} not installed: pip install -e '.[serve]'"
        )
    job.check_pictures()
    if jax.process_count() > 1:
        raise UserError("--mode=serve runs in one process; leave out the flags of a multi-host job")
    from ddpm_jax.serve.actions import Playground
    from ddpm_jax.serve.app import is_loopback, make_app
    from ddpm_jax.serve.queue import Queue
    from ddpm_jax.serve.server import Server

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there: {error.strerror}") from None
    playground = Playground(job.run, job.folder.resolve().name, batch_size or _BATCH_SIZE)
    waiting = Queue(queue)
    address = f"[{host}]" if ":" in host else host
    print(f"{job.run.weights}: http://{address}:{listening.getsockname()[1]}  (Ctrl-C stops it)", flush=True)
    if playground.without_source:
        print(f"without training images: {playground.without_source}", flush=True)
    if not is_loopback(host):
        print("anyone who can reach this machine can use it: there is no password", flush=True)
    # The server installs its own handlers, and calls these once it has stopped.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        Server(make_app(playground, waiting, host), waiting).run([listening])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    waiting.join()
    print("the playground has stopped", flush=True)


def missing_packages() -> list[str]:
    """The packages of the extra "serve" that are not installed."""
    return [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
