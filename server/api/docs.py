"""What the OpenAPI document says beside the models."""

from __future__ import annotations

from typing import Any

from server.api.views import ErrorAnswer

TITLE = "MHR Server"
SUMMARY = "One backbone, a learned inventory of adapters, and tasks that are small routings over it."
DESCRIPTION = """
Every error has the body `{"error": {"type", "message", "param", "code"}}`. Unknown fields are refused.
`POST /generate` answers with a task, `POST /adapt` learns a new one from examples in the background.
"""

_REASONS = {
    400: "The body is not JSON",
    401: "The API key is missing or unknown",
    404: "There is no such task, version, job or inventory",
    409: "The present state forbids it",
    413: "Too large: the body, the prompt or the number of answers",
    422: "A field is unknown, missing or impossible; `param` names it",
    424: "The task's adapter cannot be assembled",
    500: "An unexpected error; the server's log names the request id and the cause",
    503: "Warming, draining or the queue is full; `Retry-After` says when to try again",
    504: "The deadline passed",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": reason} for status, reason in _REASONS.items()
}
