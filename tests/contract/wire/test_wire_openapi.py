"""The OpenAPI document: complete, with examples that work, and true for requests made up from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.contract.wire.conftest import check_answer
from tests.support.tiny_server import LiveServer

ROUTES = {
    "/generate": {"post"},
    "/adapt": {"post"},
    "/jobs": {"get"},
    "/jobs/{job_id}": {"get"},
    "/jobs/{job_id}/cancel": {"post"},
    "/jobs/{job_id}/events": {"get"},
    "/tasks": {"get"},
    "/tasks/{task_id}": {"get", "put", "patch", "delete"},
    "/tasks/{task_id}/promote": {"post"},
    "/tasks/{task_id}/export": {"get"},
    "/inventories": {"get"},
    "/inventories/{name}": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
    "/info": {"get"},
}


def test_the_routes_are_the_designed_ones(openapi: dict[str, Any]) -> None:
    assert {path: set(operations) for path, operations in openapi["paths"].items()} == ROUTES


def test_every_operation_and_its_errors_are_described(openapi: dict[str, Any]) -> None:
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            documented = operation["responses"].get("422")
            if documented is not None:
                reference = documented["content"]["application/json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/ErrorAnswer", (method, path)


def test_the_pages_for_people_are_there(client: httpx.Client) -> None:
    assert "MHR Server" in client.get("/docs").text


@pytest.fixture(scope="module")
def document(openapi: dict[str, Any], shared_server: LiveServer) -> schemathesis.BaseSchema:
    loaded = schemathesis.openapi.from_dict(openapi)
    loaded.config.update(base_url=shared_server.url)
    return loaded


@pytest.mark.parametrize(
    ("path", "method"),
    [(path, method) for path, methods in ROUTES.items() for method in sorted(methods)],
)
def test_requests_made_up_from_the_document_get_documented_answers(
    document: schemathesis.BaseSchema, openapi: dict[str, Any], path: str, method: str
) -> None:
    @settings(
        max_examples=15,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=document[path][method.upper()].as_strategy())
    def call(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("parameters"), dict):
            case.body["parameters"]["max_new_tokens"] = 4  # a made-up number is a long time
        response = case.call(timeout=30)
        assert response.status_code < 500 or response.status_code == 503, response.text
        kind = response.headers.get("content-type", [""])[0]
        request = httpx.Request(case.method, f"http://server{case.formatted_path}")
        answer = httpx.Response(
            response.status_code, headers={"content-type": kind}, content=response.content, request=request
        )
        check_answer(openapi, answer)

    call()


@pytest.mark.parametrize("name", ["GenerateRequest", "AdaptRequest", "TaskPut"])
def test_the_documents_examples_are_accepted(
    openapi: dict[str, Any], make_server: Callable[..., LiveServer], name: str
) -> None:
    live = make_server(tasks=True)
    live.runtime.store.register_task(
        "task1217_atomic_answer_generation",
        instruction="",
        defaults={},
        inventory="tiny",
        metadata={},
        kind="mu",
        blob=None,
    )
    route = {
        "GenerateRequest": ("POST", "/generate"),
        "AdaptRequest": ("POST", "/adapt"),
        "TaskPut": ("PUT", "/tasks/t"),
    }
    examples = openapi["components"]["schemas"][name]["examples"]
    assert examples
    for example in examples:
        method, path = route[name]
        answer = httpx.request(method, live.url + path, json=example, timeout=60)
        assert answer.is_success, answer.text
