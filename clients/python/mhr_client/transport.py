"""What both clients share about HTTP, without doing any: one call's request and parser, retries, errors, events."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from mhr_client.errors import (
    ERRORS_BY_STATUS,
    ERRORS_BY_TYPE,
    APIError,
    ConnectionFailed,
    MHRClientError,
    ProtocolError,
    ServerError,
    Unavailable,
)

T = TypeVar("T")

DEFAULT_BASE_URL = "http://127.0.0.1:8000"

# Only these end a line; JSON text may hold other characters that str.splitlines would split at.
_LINE_BREAK = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how to read its answer."""

    method: str
    path: str
    parse: Callable[[bytes], T]
    params: Mapping[str, str | int] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Keyword arguments of httpx for this request."""
        return {
            "method": self.method,
            "url": self.path,
            "params": self.params,
            "json": self.body,
            "headers": self.headers,
        }


@dataclass(frozen=True)
class ServerEvent:
    """One server-sent event: its name, its JSON data and its id (empty where the server gave none)."""

    name: str
    data: Any
    id: str = ""


@dataclass(frozen=True)
class RetryPolicy:
    """When to send a request again: after a failed connect, and after a 503 that says when (`Retry-After`).

    In both cases the server has done nothing with the request. `retries` bounds the further attempts,
    `backoff_s` is the first pause after a failed connect (doubled each time). A pause is at most `max_wait_s`; a
    server that asks for a longer one is not asked again.
    """

    retries: int = 3
    backoff_s: float = 0.25
    max_wait_s: float = 10.0

    def wait_after(self, attempt: int, error: MHRClientError) -> float | None:
        """Seconds to wait after attempt number `attempt` (from 0) ended with `error`, or None to give up."""
        if attempt >= self.retries:
            return None
        if isinstance(error, ConnectionFailed) and not error.reached:
            return min(self.backoff_s * 2.0**attempt, self.max_wait_s)
        if isinstance(error, Unavailable) and error.retry_after_s is not None:
            return error.retry_after_s if error.retry_after_s <= self.max_wait_s else None
        return None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The seconds of a `Retry-After` header; None where there is none or it is a date."""
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def request_headers(api_key: str | None) -> dict[str, str]:
    """Headers that every request carries."""
    headers = {"User-Agent": "mhr-client", "Accept": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    return headers


def load_json(content: bytes) -> Any:
    """Decode an answer. Raises ProtocolError where it is not JSON."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise ProtocolError(f"the answer is not JSON; is this an MHR server? It begins {content[:80]!r}") from error


def error_from_answer(status: int, headers: Mapping[str, str], content: bytes) -> APIError:
    """The error of a refused request, with the server's message where the answer has one."""
    try:
        details = json.loads(content)["error"]
        message = str(details["message"])
    except (ValueError, KeyError, TypeError):
        details, message = {}, f"the server answered {status} without an explanation: {content[:200]!r}"
    return _error(ERRORS_BY_STATUS.get(status, ServerError), message, details, status, retry_after_s(headers))


def error_from_event(data: Any) -> APIError:
    """The error that ends a stream; its class follows from its type, since the stream began with status 200."""
    details = data.get("error", data) if isinstance(data, dict) else {}
    message = str(details.get("message", "the server ended the stream with an error"))
    return _error(ERRORS_BY_TYPE.get(str(details.get("type")), ServerError), message, details)


def _error(
    cls: type[APIError],
    message: str,
    details: Mapping[str, Any],
    status: int | None = None,
    retry_after: float | None = None,
) -> APIError:
    reasons = {name: details.get(name) for name in ("type", "param", "code")}
    return cls(message, status=status, retry_after_s=retry_after, **reasons)


def connection_failed(base_url: object, cause: httpx.TransportError) -> ConnectionFailed:
    """A connection error as one of this package, with a remedy."""
    reached = not isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout)
    reason = str(cause) or type(cause).__name__
    if reached:
        message = f"the connection to {base_url} broke before the answer was complete: {reason}"
    else:
        message = f"no connection to {base_url}: {reason}. Is the server running there?"
    error = ConnectionFailed(message, reached=reached)
    error.__cause__ = cause
    return error


class EventDecoder:
    """Turns the bytes of a server-sent event stream into events, however the bytes are cut."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""
        self._name = ""
        self._id = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """Take the next bytes; yields every event that they complete."""
        text = self._rest + self._decoder.decode(chunk)
        # A carriage return at the end may be the first half of a line break.
        held = "\r" if text.endswith("\r") else ""
        *lines, rest = _LINE_BREAK.split(text.removesuffix(held))
        self._rest = rest + held
        for line in lines:
            yield from self._take(line)

    def _take(self, line: str) -> Iterator[ServerEvent]:
        if not line:
            if self._data:
                yield ServerEvent(self._name or "message", load_json("\n".join(self._data).encode()), self._id)
            self._name, self._data = "", []
            return
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "event":
            self._name = value
        elif key == "data":
            self._data.append(value)
        elif key == "id":
            self._id = value
