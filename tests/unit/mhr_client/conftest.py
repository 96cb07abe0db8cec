"""A server made of canned answers: `httpx.MockTransport` under both clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Handler = Callable[[httpx.Request], httpx.Response]

JOB: dict[str, Any] = {
    "id": "job-0123456789abcdef",
    "task_id": "ticket-tags",
    "method": "mhr-z",
    "status": "queued",
    "version": None,
    "progress": {},
    "metrics": {},
    "error": None,
    "attempts": 0,
    "cancel_requested": False,
    "inventory": "superni",
    "promote": "if_better",
    "num_examples": 2,
    "created_at": "2026-01-02T03:04:05Z",
    "started_at": None,
    "finished_at": None,
}
TASK: dict[str, Any] = {
    "id": "ticket-tags",
    "instruction": "Name the product area.",
    "defaults": {"max_new_tokens": 8},
    "inventory": "superni",
    "served_version": 1,
    "metadata": {},
    "created_at": "2026-01-02T03:04:05Z",
    "updated_at": "2026-01-02T03:04:05Z",
}
GENERATION: dict[str, Any] = {
    "id": "gen-1",
    "task_id": "ticket-tags",
    "version": 1,
    "outputs": [
        {"index": 0, "text": "billing", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 2},
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    "timing": {"queue_ms": 0, "ttft_ms": 12.5, "total_ms": 20.0},
}


class FakeServer:
    """Answers requests with the given handler, or with a queue of answers, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self._answers: list[httpx.Response | Exception] = []

    def will(self, *answers: httpx.Response | Exception) -> None:
        self._answers.extend(answers)

    def will_json(self, *bodies: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.will(*(httpx.Response(status, json=body, headers=headers) for body in bodies))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)

    def sent_json(self, number: int = -1) -> Any:
        return json.loads(self.requests[number].content)


@pytest.fixture
def fake_server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def error_body() -> Callable[..., dict[str, Any]]:
    def make(type: str = "not_found", message: str = "no such task", param: str | None = None) -> dict[str, Any]:
        return {"error": {"type": type, "message": message, "param": param, "code": type}}

    return make


@pytest.fixture
def job() -> dict[str, Any]:
    return dict(JOB)


@pytest.fixture
def task() -> dict[str, Any]:
    return dict(TASK)


@pytest.fixture
def generation() -> dict[str, Any]:
    return dict(GENERATION)


@pytest.fixture
def sse() -> Callable[..., bytes]:
    def make(*events: tuple[str, Any]) -> bytes:
        return "".join(f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n" for name, data in events).encode()

    return make
