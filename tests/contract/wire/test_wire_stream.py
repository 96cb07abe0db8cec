"""Server-sent events of /generate, and what happens when a client goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.support.tiny_server import LiveServer

Event = tuple[str, dict[str, Any]]


def read_events(response: httpx.Response) -> list[Event]:
    """Events as strictly framed: `event:` and one `data:` line each, then a blank line."""
    response.read()
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        name, data = lines[-2], lines[-1]
        assert name.startswith("event: "), block
        assert data.startswith("data: "), block
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def stream(client: httpx.Client, body: dict[str, Any]) -> list[Event]:
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return read_events(response)


def test_tokens_then_one_done_with_the_whole_answer(client: httpx.Client) -> None:
    body = {"task_id": "capital", "inputs": ["one", "two"], "parameters": {"max_new_tokens": 20, "ignore_eos": True}}
    events = stream(client, body)
    assert [name for name, _ in events[:-1]] == ["token"] * (len(events) - 1)
    name, done = events[-1]
    assert name == "done"
    plain = client.post("/generate", json=body).json()
    for index in (0, 1):
        text = "".join(data["text"] for event, data in events if event == "token" and data["index"] == index)
        assert text == done["outputs"][index]["text"] == plain["outputs"][index]["text"]
    assert done["usage"] == plain["usage"]


def test_no_part_of_a_stop_string_is_streamed(client: httpx.Client) -> None:
    body: dict[str, Any] = {"task_id": "rhyme", "inputs": "x", "parameters": {"max_new_tokens": 40, "ignore_eos": True}}
    text = client.post("/generate", json=body).json()["outputs"][0]["text"]
    body["parameters"]["stop"] = text[8:11]
    events = stream(client, body)
    streamed = "".join(data["text"] for name, data in events if name == "token")
    assert streamed == text[: text.index(text[8:11])] == events[-1][1]["outputs"][0]["text"]


def test_a_refused_stream_has_its_own_status(client: httpx.Client) -> None:
    body = {"task_id": "nobody", "inputs": "x", "stream": True}
    answer = client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")


# With one sequence at a time, most of a minute of work even for a tiny model: a client can leave in the middle of it
# on any machine.
ONE_AT_A_TIME = 1
SLOW = {"max_new_tokens": 240, "ignore_eos": True, "n": 120}
LONG_WORK = {"task_id": "base", "inputs": ["x", "y"], "parameters": SLOW}


def test_an_error_in_the_middle_is_the_last_event(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    live = make_server(max_batch=ONE_AT_A_TIME, request_timeout_s=2)
    events = stream(connect(live), {"task_id": "base", "inputs": "x", "parameters": SLOW})
    assert [name for name, _ in events].count("error") == 1
    name, data = events[-1]
    assert (name, data["error"]["type"]) == ("error", "deadline_exceeded")


def wait_until_idle(live: LiveServer) -> None:
    services = live.runtime.services()
    deadline = time.monotonic() + 20
    while services.engine.num_open:
        assert time.monotonic() < deadline, "the engine still works for a client that is gone"
        time.sleep(0.02)


def test_a_client_that_leaves_a_stream_ends_its_work(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    live = make_server(max_batch=ONE_AT_A_TIME)
    client = connect(live)
    with client.stream("POST", "/generate", json={**LONG_WORK, "stream": True}) as response:
        assert next(response.iter_lines()) == "event: token"
        assert live.runtime.services().engine.num_open, "the answer came too soon for this test"
    wait_until_idle(live)
    assert 'mhr_cancelled_total{reason="client_gone"} 1.0' in client.get("/metrics").text


def test_a_client_that_hangs_up_on_a_plain_request_ends_its_work(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    live = make_server(max_batch=ONE_AT_A_TIME)
    try:
        httpx.post(f"{live.url}/generate", json=LONG_WORK, timeout=httpx.Timeout(10, read=0.2))
        raise AssertionError("the answer came too soon for this test")
    except httpx.ReadTimeout:
        pass
    wait_until_idle(live)
    metrics = connect(live).get("/metrics").text
    assert 'mhr_requests_total{outcome="cancelled",route="/generate",task="base"} 1.0' in metrics
