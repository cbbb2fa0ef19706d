"""The playground's routes and access checks.

A request for pictures is one POST. Its response is a stream of JSON lines, from the place in the queue to the pictures;
closing the connection cancels it. Nothing is written to disk, and nothing is kept after a response.
"""

import asyncio
import contextlib
import importlib.resources
import ipaddress
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.serve.actions import Action, Playground
from ddpm_jax.serve.queue import FullError, Queue, Task

_MAX_BODY = 16 << 20  # bytes of a request
_BODY_SECONDS = 30  # for receiving it
_DROP_SECONDS = 5
_PULSE_SECONDS = 0.5  # between lines while a request waits

_STATIC = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def make_app(playground: Playground, queue: Queue, host: str) -> ASGIApp:
    """The application.

    Args:
      playground: the actions.
      queue: runs them.
      host: the address that the server listens on; if it is a loopback address, only loopback names are accepted.
    """
    # Uploads are decoded one at a time, so that many pictures cannot use much memory.
    decoding = asyncio.Semaphore(1)

    async def checked(request: Request, function: Callable[[Mapping[str, Any]], Any]) -> Any:
        form = await _form(request)
        try:
            async with decoding:
                return await run_in_threadpool(function, form)
        finally:
            await form.close()

    async def act(request: Request) -> Response:
        name = request.path_params["action"]
        if name not in playground.actions:
            raise HTTPException(404)
        queue.check()  # before its pictures are received
        action: Action = await checked(request, playground.actions[name])
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(changed.set)

        task = action.task(tell)
        queue.submit(task)
        return Told(queue, task, changed)

    async def fit(request: Request) -> Response:
        return JSONResponse(await checked(request, playground.fitted))

    async def facts(request: Request) -> Response:
        return JSONResponse(playground.facts())

    async def training_images(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(playground.training_page, request.query_params))

    static = importlib.resources.files("ddpm_jax.serve") / "static"
    routes = [
        *(Route(path, _file((static / name).read_bytes(), kind)) for path, (name, kind) in _STATIC.items()),
        Route("/api/run", facts),
        Route("/api/training_images", training_images),
        Route("/api/fit", fit, methods=["POST"]),
        Route("/api/{action}", act, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        UserError: lambda request, error: _error(400, str(error)),
        FullError: lambda request, error: _full(error),
        HTTPException: lambda request, error: _error(
            error.status_code, _SENTENCES.get(error.status_code, error.detail)
        ),
        ClientDisconnect: lambda request, error: _error(400, "the request was aborted"),
        Exception: lambda request, error: _error(500, "internal error; see the playground's terminal"),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), is_loopback(host))


_SENTENCES = {
    404: "there is nothing at this address",
    405: "this address does not accept this method",
    408: f"the request did not arrive within {_BODY_SECONDS} seconds",
    413: f"the request is too large; accepted: at most {_MAX_BODY >> 20} MiB",
}


def _file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind)

    return answer


def _error(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _full(error: FullError) -> Response:
    wait = "" if error.seconds is None else f"; they take about {math.ceil(error.seconds)} seconds"
    sentence = f"the queue is full: {error.waiting} requests are waiting{wait}. Try again later"
    return _error(503, sentence, {"retry-after": str(max(1, math.ceil(error.seconds or 10)))})


async def _form(request: Request) -> FormData:
    """The fields and files of a request, in memory alone."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UserError("the request is not a form; accepted: multipart/form-data")
    parser = MultiPartParser(request.headers, request.stream(), max_files=2, max_fields=20, max_part_size=1000)
    parser.spool_max_size = _MAX_BODY + 1
    try:
        return await asyncio.wait_for(parser.parse(), _BODY_SECONDS)
    except TimeoutError:
        raise HTTPException(408) from None
    except (MultiPartException, FormParserError) as error:
        said = error.message if isinstance(error, MultiPartException) else str(error)
        raise UserError(f"the form cannot be read: {said}") from None


class Told(StreamingResponse):
    """Streams one line per event of a task, and meanwhile its place in the queue or its progress."""

    def __init__(self, queue: Queue, task: Task, changed: asyncio.Event):
        super().__init__(self._lines(), media_type="application/x-ndjson")
        self._queue, self._task, self._changed = queue, task, changed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the client may have disconnected
            self._queue.cancel(self._task)

    async def _lines(self) -> AsyncIterator[str]:
        while True:
            self._changed.clear()
            for event in self._task.events() or self._meanwhile():
                yield json.dumps(event) + "\n"
                if event["state"] in ("done", "failed"):
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _PULSE_SECONDS)

    def _meanwhile(self) -> list[dict[str, Any]]:
        place = self._queue.place(self._task)
        if place is not None:
            return [{"state": "waiting", "ahead": place[0], "seconds": place[1]}]
        return [{"state": "running", "done": self._task.done, "calls": self._task.calls}] if self._task.done else []


# Access checks.


class Guard:
    """Refuses requests from other sites and requests that are too large, and adds security headers to every response.

    Pages of other sites cannot use the playground through the browser: their requests carry that site's name as Origin,
    or, with DNS rebinding, a name of theirs as Host.
    """

    def __init__(self, app: ASGIApp, loopback: bool):
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        body = _Body(receive)

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                await body.drop()
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers[name] = value
                if not body.ended:
                    headers["connection"] = "close"
            await send(message)

        refused = self._refused(Headers(scope=scope), scope["method"])
        if refused:
            await refused(scope, receive, secured)
        else:
            await self.app(scope, body.receive, secured)

    def _refused(self, headers: Headers, method: str) -> Response | None:
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.loopback and not is_loopback(name.strip("[]")):
            return _error(400, f"the playground is at 127.0.0.1, not at {name[:100]!r}")
        if method not in ("GET", "HEAD"):
            origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
            if site not in ("same-origin", "none") or (origin is not None and origin.partition("://")[2] != host):
                return _error(403, "this request comes from another site's page")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > _MAX_BODY:
            return _error(413, _SENTENCES[413])
        return None


class _Body:
    """The body of a request, of which at most _MAX_BODY bytes are passed on."""

    def __init__(self, receive: Receive):
        self.ended = False
        self._receive, self._size = receive, 0

    async def receive(self) -> Message:
        message = await self._next()
        if self._size > _MAX_BODY:
            raise HTTPException(413)
        return message

    async def drop(self) -> None:
        """Receives and discards the rest, within limits: most clients read no response before sending everything."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP_SECONDS):
                while not self.ended and self._size < 4 * _MAX_BODY:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message


def is_loopback(host: str) -> bool:
    """Whether this is a loopback name, by which no other machine can reach this one."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
