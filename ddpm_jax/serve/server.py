"""A uvicorn server that also stops running computations when it shuts down."""

import logging
import socket

import uvicorn
from starlette.types import ASGIApp

from ddpm_jax.serve.queue import Queue

_MAX_CONNECTIONS = 200  # further ones are refused immediately


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM."""

    def __init__(self, app: ASGIApp, queue: Queue):
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                limit_concurrency=_MAX_CONNECTIONS,
                lifespan="off",
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=5,
                ws="none",
            )
        )
        self._queue = queue
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # or every broken form is logged

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.close()  # so that shutting down does not wait for responses
        await super().shutdown(sockets)
