"""One place turns every error into the designed JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import State
from starlette.exceptions import HTTPException

import adapters_store.errors as store_errors
from server.errors import AdapterUnavailable, Conflict, InvalidInput, MHRError, NotFound, Unavailable
from server.logs import get_logger

log = get_logger(__name__)


class BadRequest(InvalidInput):
    """The request is not HTTP with JSON as the route expects it."""

    status = 400


class MethodNotAllowed(MHRError):
    """The route exists, but not with this method."""

    status = 405
    type = "method_not_allowed"


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(MHRError, _handle)
    app.add_exception_handler(store_errors.StoreError, _handle)
    app.add_exception_handler(RequestValidationError, _handle)
    app.add_exception_handler(HTTPException, _handle)


async def _handle(request: Request, error: Exception) -> JSONResponse:
    known = to_error(error)
    if isinstance(error, store_errors.NotFound) and known.param is None:
        known.param = next(iter(request.path_params), None)
    note(request.state, known, error)
    return response(known, getattr(error, "headers", None))


def note(state: State, known: MHRError, cause: Exception) -> None:
    """Leave the error's kind for the access log and the metrics; log what we did not foresee."""
    if known.type == "server_error":
        log.error("unexpected error", action="request.failed", exc_info=cause)
    state.outcome = known.type
    state.code = known.code


def to_error(error: Exception) -> MHRError:
    """Any exception as one of our errors; what is unknown tells nothing about the inside."""
    if isinstance(error, MHRError):
        return error
    if isinstance(error, store_errors.StoreError):
        return _from_store(error)
    if isinstance(error, RequestValidationError):
        return _from_validation(error.errors())
    if isinstance(error, HTTPException):
        return _from_http(error)
    return MHRError("the server met an unexpected error; its log names the request id and the cause")


def body(error: MHRError) -> dict[str, Any]:
    """The error's JSON."""
    return {"error": {"type": error.type, "message": error.message, "param": error.param, "code": error.code}}


def response(error: MHRError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error as an HTTP response."""
    headers = dict(headers or {})
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(error), error.status, headers)


def param_of(loc: Sequence[str | int]) -> str | None:
    """("body", "examples", 3, "output") -> "examples[3].output"."""
    text = ""
    for part in loc[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or None


def _from_store(error: store_errors.StoreError) -> MHRError:
    if isinstance(error, store_errors.NotFound):
        return NotFound(str(error))
    if isinstance(error, store_errors.Conflict):
        return Conflict(str(error))
    if isinstance(error, store_errors.InvalidValue):
        return InvalidInput(str(error), param=error.field)
    if isinstance(error, store_errors.BlobMissing | store_errors.BlobDamaged):
        return AdapterUnavailable(str(error), code="blob_damaged")
    if isinstance(error, store_errors.CatalogUnavailable):
        return Unavailable(str(error), retry_after_s=5, code="catalog_unavailable")
    return MHRError("the store failed; the server's log has the cause")


def _from_validation(problems: Sequence[Any]) -> MHRError:
    """The first problem makes the error's `param`; the message counts the others."""
    first = problems[0]
    loc = tuple(first["loc"])
    if first["type"] == "json_invalid":
        detail = first.get("ctx", {}).get("error", "it cannot be parsed")
        return BadRequest(f"the body is not JSON: {detail} at character {loc[-1]}", code="invalid_json")
    if loc == ("body",) and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        return BadRequest("the body is not a JSON object; send one, with Content-Type: application/json")
    param = param_of(loc)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        reason = "there is no such field; remove it or correct its name"
    if first["type"] == "missing":
        reason = "it is missing"
    message = f"{param}: {reason}" if param else reason
    if len(problems) > 1:
        others = [param_of(tuple(p["loc"])) or "body" for p in problems[1:6]]
        message += f" (also wrong: {', '.join(others)}{', …' if len(problems) > 6 else ''})"
    return InvalidInput(message, param=param, code=first["type"])


def _from_http(error: HTTPException) -> MHRError:
    # FastAPI wraps whatever interrupts the reading of a body, our own body limit too.
    if isinstance(error.__cause__, MHRError):
        return error.__cause__
    if error.status_code == 404:
        return NotFound("there is no such route; GET /docs lists them", code="unknown_route")
    if error.status_code == 405:
        return MethodNotAllowed("the route does not take this method; GET /docs lists them")
    if error.status_code == 400:
        return BadRequest(str(error.detail), code="bad_request")
    known = MHRError(str(error.detail))
    known.status = error.status_code
    return known
