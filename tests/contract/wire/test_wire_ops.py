"""Probes, metrics, keys, request ids and /info."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server import runtime as runtime_module
from server.backbone import Backbone
from tests.support.tiny_server import LiveServer

Connect = Callable[[LiveServer], httpx.Client]
MakeServer = Callable[..., LiveServer]


@pytest.fixture
def slow_load(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Loading the backbone waits for this event."""
    may_load = threading.Event()
    load = runtime_module.load_backbone

    def slow(*args: object, **kwargs: object) -> Backbone:
        assert may_load.wait(20)
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime_module, "load_backbone", slow)
    return may_load


def test_while_warming_it_lives_and_is_not_ready(
    make_server: MakeServer, connect: Connect, slow_load: threading.Event
) -> None:
    live = make_server(wait=False)
    client = connect(live)
    assert client.get("/healthz").json() == {"status": "ok", "reason": None}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (503, "warming")
    assert "loading the backbone" in ready.json()["reason"]
    refused = client.post("/generate", json={"task_id": "base", "inputs": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "warming")
    assert int(refused.headers["Retry-After"]) >= 1
    assert client.get("/info").json()["backbone"] is None
    assert client.get("/tasks").status_code == 200
    slow_load.set()
    live.wait_ready()
    assert client.get("/readyz").json() == {"status": "ready", "reason": None}
    assert client.post("/generate", json={"task_id": "base", "inputs": "x"}).status_code == 200


def test_while_draining_new_work_is_refused_and_work_in_flight_finishes(
    make_server: MakeServer, connect: Connect
) -> None:
    live = make_server(tasks=True, max_batch=4)  # few at a time: in flight for a while
    client = connect(live)
    slow = {"task_id": "base", "inputs": "x", "parameters": {"max_new_tokens": 200, "ignore_eos": True, "n": 32}}
    answers: list[httpx.Response] = []
    in_flight = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{live.url}/generate", json=slow, timeout=60))
    )
    in_flight.start()
    while not live.runtime.services().engine.num_open:
        pass
    draining = threading.Thread(target=lambda: asyncio.run(live.runtime.drain()))
    draining.start()
    while client.get("/readyz").status_code == 200:
        pass
    assert client.get("/readyz").json()["status"] == "draining"
    for path, body in (
        ("/generate", slow),
        ("/adapt", {"task_id": "t", "examples": [{"input": "a", "output": "b"}] * 2}),
    ):
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "Retry-After" in refused.headers
    assert client.get("/tasks").status_code == 200
    draining.join()
    in_flight.join()
    assert answers[0].status_code == 200
    assert all(output["completion_tokens"] == 200 for output in answers[0].json()["outputs"])


def test_keys_are_wanted_where_work_is_done(make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team keys\nalice:secret-a\nbob:secret-b\n")
    client = connect(make_server(api_keys_file=keys))
    body = {"task_id": "base", "inputs": "x", "parameters": {"max_new_tokens": 1}}
    for path in ("/tasks", "/jobs", "/inventories", "/info"):
        assert client.get(path).status_code == 401
    missing = client.post("/generate", json=body)
    assert (missing.status_code, missing.json()["error"]["code"]) == (401, "missing_key")
    assert missing.headers["WWW-Authenticate"] == "Bearer"
    unknown = client.post("/generate", json=body, headers={"Authorization": "Bearer secret-c"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (401, "unknown_key")
    assert client.post("/generate", json=body, headers={"Authorization": "Bearer secret-b"}).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics"):
        assert client.get(path).status_code == 200
    assert "secret" not in client.get("/info", headers={"Authorization": "Bearer secret-a"}).text.replace(str(keys), "")


def test_a_request_id_is_given_or_kept(client: httpx.Client) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", client.get("/healthz").headers["X-Request-Id"])
    assert client.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    assert client.get("/nowhere", headers={"X-Request-Id": "mine-2"}).headers["X-Request-Id"] == "mine-2"
    odd = client.get("/healthz", headers={"X-Request-Id": "a b\tc"}).headers["X-Request-Id"]
    assert re.fullmatch(r"[0-9a-f]{32}", odd)


def test_info_tells_what_runs(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert (info["status"], info["inventory"]) == ("ready", "tiny")
    assert info["backbone"]["context_length"] == 256
    assert info["backbone"]["dtype"] == "float32"
    assert info["tasks"] >= 2
    assert info["settings"]["inventory"] == "tiny"


def test_info_hides_a_database_password(make_server: MakeServer, connect: Connect, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.sqlite3"
    client = connect(make_server(database_url=url))
    assert client.get("/info").json()["settings"]["database_url"] == url


def test_metrics_count_by_route_task_and_outcome(make_server: MakeServer, connect: Connect) -> None:
    client = connect(make_server(tasks=True))
    body = {"task_id": "capital", "inputs": "x", "parameters": {"max_new_tokens": 4, "ignore_eos": True}}
    client.post("/generate", json=body)
    client.post("/generate", json={**body, "task_id": "nobody"})
    client.post("/generate", json={**body, "unknown": 1})
    client.get("/nowhere")
    text = client.get("/metrics").text
    for line in (
        'mhr_requests_total{outcome="ok",route="/generate",task="capital"} 1.0',
        'mhr_requests_total{outcome="not_found",route="/generate",task="none"} 1.0',
        'mhr_requests_total{outcome="invalid_request",route="/generate",task="none"} 1.0',
        'mhr_requests_total{outcome="not_found",route="unmatched",task="none"} 1.0',
        'mhr_request_duration_seconds_count{route="/generate"} 3.0',
        'mhr_generated_tokens_total{task="capital"} 4.0',
        "mhr_time_to_first_token_seconds_count 1.0",
        "mhr_inter_token_latency_seconds_count 3.0",
        'mhr_adapter_assembly_seconds_count{kind="routing"} 1.0',
        'mhr_adapter_cache_lookups_total{result="miss",tier="assembled"} 1.0',
        'mhr_adapt_jobs{status="queued"} 0.0',
    ):
        assert line in text.splitlines(), line
    assert 'mhr_steps_total{path="slots"}' in text


def test_a_broken_engine_asks_for_a_restart(
    make_server: MakeServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make_server(tasks=True)
    client = connect(live)

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    for part in ("step", "fail_all"):
        monkeypatch.setattr(live.runtime.services().engine._engine, part, fail)
    body = {"task_id": "base", "inputs": "x"}
    assert client.post("/generate", json=body).status_code == 500
    for path in ("/healthz", "/readyz"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
        assert "restart" in answer.json()["reason"]
    assert client.post("/generate", json=body).status_code == 503
    assert client.get("/tasks").status_code == 200
    assert client.get("/metrics").status_code == 200
