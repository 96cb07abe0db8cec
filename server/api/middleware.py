"""What surrounds every request: its id, its log line, its metrics, the body limit and the last error handler."""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders, State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import errors
from server.errors import TooLarge
from server.logs import get_logger
from server.metrics import Metrics

REQUEST_ID_HEADER = "X-Request-Id"
UNMATCHED_ROUTE = "unmatched"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# Outcomes that say "not now" or "not so much", whose codes are few.
_REJECTIONS = frozenset({"unavailable", "too_large", "rate_limited"})
# Asked by machines every few seconds.
_QUIET_ROUTES = frozenset({"/healthz", "/readyz", "/metrics"})

log = get_logger(__name__)


class RequestContext:
    """Gives each request an id, and afterwards writes one log line and counts it.

    Handlers leave facts in `request.state`: `task` (a known task's id), `outcome`, `code`, `key_name`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex
        state = State(scope.setdefault("state", {}))
        state.request_id = request_id
        status: int | None = None
        start_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                known = errors.to_error(error)
                errors.note(state, known, error)
                if status is None:
                    await errors.response(known)(scope, receive, send_with_id)
            finally:
                self._record(scope, state, status, time.perf_counter() - start_s)

    def _record(self, scope: Scope, state: State, status: int | None, seconds: float) -> None:
        matched = scope.get("route")
        route = UNMATCHED_ROUTE if matched is None else matched.path
        outcome = getattr(state, "outcome", None) or ("cancelled" if status is None else "ok")
        task = getattr(state, "task", None)
        if outcome in _REJECTIONS:
            self._metrics.rejected(getattr(state, "code", outcome))
        self._metrics.http_request(route=route, task=task, outcome=outcome, seconds=seconds)
        write = log.debug if route in _QUIET_ROUTES and outcome == "ok" else log.info
        write(
            f"{scope['method']} {scope['path']} {status}",
            action="request.finished",
            method=scope["method"],
            route=route,
            status=status,
            outcome=outcome,
            code=getattr(state, "code", None),
            task=task,
            key=getattr(state, "key_name", None),
            duration_ms=round(seconds * 1000, 1),
        )


class BodyLimit:
    """Refuses a body above the limit, by its announced length or while it comes in."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("Content-Length", "0")
        if announced.isdigit() and int(announced) > self._limit:
            raise self._too_large(int(announced))
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large(received)
            return message

        await self._app(scope, counted, send)

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(
            f"the body has {size} bytes or more; the limit is {self._limit} bytes (MHR_MAX_BODY_MB). Send less at once",
            code="body_too_large",
        )
