"""Around the paths: API keys, the size of bodies, counters, and every error as OpenAI's error object."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from buddy.errors import BuddyError, BudgetError

log = logging.getLogger("buddy.serve")
MAX_BODY = 4 * 2**20  # bytes
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)  # bounds of the histograms


class ApiError(Exception):
    """An answer other than 200, as OpenAI's error object.

    Args:
        message: one sentence.
        status: of HTTP.
        field: of the request that is wrong.
        code: short name.
    """

    def __init__(self, message: str, status: int = 400, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    @property
    def body(self) -> dict[str, Any]:
        """{"error": …}."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = str(self).encode(errors="backslashreplace").decode()  # JSON's "\\ud800" alone is no text in UTF-8
        return {"error": {"message": message, "type": kind, "param": self.field, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        """The answer."""
        retry = {"Retry-After": "1"} if self.status == 429 else {}
        return JSONResponse(self.body, self.status, {**(headers or {}), **retry})


class ClientLeft(Exception):
    """Nobody reads the answer."""


# What `answer_error` answers.
ERRORS: tuple[type[Exception], ...] = (ApiError, BuddyError, ClientLeft, HTTPException, RequestValidationError)


class Metrics:
    """Counters of one server, which `/metrics` shows in the text format of Prometheus.

    Attributes:
        requests: by path and status.
        queue, rows: texts that wait, texts that are written.
        written: new tokens.
        first, between: seconds from a request to its first token, and from token to token.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "buddy"}
        self.requests = Counter("requests", "Answered requests.", ["path", "status"], **common)
        self.queue = Gauge("queue", "Texts that wait for a row.", **common)
        self.rows = Gauge("rows", "Texts that are being written.", **common)
        self.written = Counter("written_tokens", "New tokens.", **common)
        self._tokens = Counter("tokens", "Routed tokens, of prompts too, by the layers of each.", ["budget"], **common)
        self._layers = Counter("layers", "Layers that they ran, by the layers of each token.", ["budget"], **common)
        self.first = Histogram("first_token_seconds", "From request to first token.", buckets=SECONDS, **common)
        self.between = Histogram("between_tokens_seconds", "From token to token.", buckets=SECONDS, **common)

    def step(self, executed: int, tokens: int) -> None:
        """Count tokens that ran so many layers each."""
        self._tokens.labels(executed).inc(tokens)
        self._layers.labels(executed).inc(executed * tokens)

    def text(self) -> bytes:
        """All of them."""
        shown: bytes = generate_latest(self._registry)
        return shown


class Guard:
    """Around the application: API keys, a limit for the size of bodies, and the count of answers.

    Args:
        app: the application.
        metrics: where to count.
        keys: any of them opens the paths under /v1; empty: no key is needed.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: Sequence[str] = ()) -> None:
        self._app, self._metrics, self._keys = app, metrics, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, size, started = dict(scope["headers"]), 0, False
        large = ApiError(f"The body is larger than {MAX_BODY} bytes; send less.", 413)

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, str(large))
            return message

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        answer, path = self._app, scope["path"]
        inner = path.removeprefix(scope.get("root_path", ""))  # of an app that is mounted in another
        if (path.startswith("/v1") or inner.startswith("/v1")) and not self._opens(headers.get(b"authorization", b"")):
            error = ApiError("The API key is missing or wrong; send it as: Authorization: Bearer KEY.", 401)
            answer = error.response({"WWW-Authenticate": "Bearer"})
        elif int(headers.get(b"content-length", b"0")) > MAX_BODY:
            answer = large.response({"Connection": "close"})
        try:
            await answer(scope, limited, counted)
        except asyncio.CancelledError:  # the server stops, and waits no longer
            if not started:
                error = ApiError("The server stopped before the answer was complete; ask again later.", 503)
                await error.response()(scope, limited, counted)
        except Exception:
            if started:
                raise
            log.exception("A request failed.")
            await ApiError("The server failed; its log says why.", 500).response()(scope, limited, counted)

    def _opens(self, header: bytes) -> bool:
        """Compares with every key, and in constant time, so that the time says nothing."""
        scheme, _, key = header.partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else header
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return not self._keys or any(matches)


async def answer_error(_: Request, error: Exception) -> Response:
    """An error of a request (one of `ERRORS`) as OpenAI's error object."""
    if isinstance(error, ClientLeft):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), error.status_code).response(dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    return (error if isinstance(error, ApiError) else ApiError(str(error))).response()


def shown_error(error: Exception) -> ApiError | ClientLeft:
    """What a client may know of an error of a text."""
    if isinstance(error, ApiError | ClientLeft):
        return error
    if isinstance(error, BudgetError):
        return ApiError(str(error), field="budget", code="invalid_budget")
    return ApiError("The server failed on this text; its log says why.", 500)


def _invalid(error: RequestValidationError) -> ApiError:
    first, *others = error.errors()
    same = [first, *(each for each in others if each["loc"][:2] == first["loc"][:2])]  # the field may have other types
    first = max(same, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))  # it fits that one most
    place = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid" or not place:
        return ApiError("The body is not valid JSON, or not an object; send application/json.")
    return ApiError(f"{place[0]}: {first['msg'].removeprefix('Value error, ')}.", field=place[0])
