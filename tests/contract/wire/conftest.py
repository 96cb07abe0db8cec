"""Servers on a tiny model, and a client that holds every answer against the server's own OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from server.logs import configure_logging
from server.settings import Settings
from tests.support.tiny_server import LiveServer, write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _logs() -> None:
    configure_logging("error")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def make_server(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., LiveServer]]:
    """Start a server with any settings; it is ready unless `wait=False`, and empty unless `tasks=True`."""
    running: list[LiveServer] = []

    def make(*, wait: bool = True, tasks: bool = False, **settings: object) -> LiveServer:
        values: dict[str, Any] = {
            "data_dir": tmp_path / "data",
            "backbone": str(tiny_model),
            "worker": False,
            "threads": 1,
            "inventory": "tiny" if tasks else None,
            **settings,
        }
        live = LiveServer(Settings(**values), tasks=tasks)
        running.append(live)
        if wait:
            live.wait_ready()
        return live

    yield make
    for live in reversed(running):
        live.stop()


@pytest.fixture(scope="package")
def shared_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests that use tasks of their own."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), backbone=str(tiny_model), worker=False, threads=1, inventory="tiny"
    )
    live = LiveServer(settings, tasks=True)
    live.wait_ready()
    yield live
    live.stop()


@pytest.fixture(scope="package")
def openapi(shared_server: LiveServer) -> dict[str, Any]:
    document: dict[str, Any] = httpx.get(f"{shared_server.url}/openapi.json").json()
    return document


@pytest.fixture
def connect(openapi: dict[str, Any]) -> Iterator[Callable[[LiveServer], httpx.Client]]:
    """Clients that fail when an answer is not what the OpenAPI document says."""
    opened: list[httpx.Client] = []

    def make(live: LiveServer) -> httpx.Client:
        hooks = {"response": [lambda response: check_answer(openapi, response)]}
        client = httpx.Client(base_url=live.url, timeout=60, event_hooks=hooks)
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()


@pytest.fixture
def client(shared_server: LiveServer, connect: Callable[[LiveServer], httpx.Client]) -> httpx.Client:
    return connect(shared_server)


def check_answer(openapi: dict[str, Any], response: httpx.Response) -> None:
    """Hold a JSON answer against the schema of its route and status; any error against the error's shape."""
    if not response.headers.get("content-type", "").startswith("application/json"):
        return
    response.read()
    request = response.request
    schema = _schema(openapi, request.method.lower(), request.url.path, response.status_code)
    if schema is not None:
        Draft202012Validator({**schema, "components": openapi["components"]}).validate(response.json())
    elif response.is_error:
        check_error(response.json())
    else:
        raise AssertionError(f"{request.method} {request.url.path} {response.status_code} is not documented")


def check_error(body: dict[str, Any]) -> None:
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "param", "code"}


def _schema(openapi: dict[str, Any], method: str, path: str, status: int) -> dict[str, Any] | None:
    for template, operations in openapi["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]+\}", "[^/]+", template), path) and method in operations:
            documented = operations[method]["responses"].get(str(status))
            assert documented is not None, f"{method} {template} answers {status}, which is not documented"
            schema: dict[str, Any] = documented["content"]["application/json"]["schema"]
            return schema
    return None
