"""POST /adapt and /jobs on the wire; the worker runs in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.training.worker import Worker
from server.worker_process import load_for_jobs
from tests.support.tiny_server import LiveServer

EXAMPLES = [{"input": f"word {i}", "output": f"answer {i % 3}"} for i in range(8)]


@pytest.fixture
def live(make_server: Callable[..., LiveServer]) -> LiveServer:
    return make_server(tasks=True)


@pytest.fixture
def api(live: LiveServer, connect: Callable[[LiveServer], httpx.Client]) -> httpx.Client:
    return connect(live)


@pytest.fixture
def worker(live: LiveServer) -> Iterator[None]:
    stopping = threading.Event()
    store, settings = live.runtime.store, live.runtime.settings
    thread = threading.Thread(
        target=Worker(store, lambda: load_for_jobs(settings, store), "test-worker").run, args=(stopping,)
    )
    thread.start()
    yield
    stopping.set()
    thread.join()


def adapt(api: httpx.Client, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return api.post("/adapt", json={"task_id": "new", "examples": EXAMPLES, "method": "mhr-z", **body}, headers=headers)


def finished(api: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (job := api.get(f"/jobs/{job_id}").json())["status"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def test_a_job_is_accepted_with_its_location(api: httpx.Client) -> None:
    accepted = adapt(api)
    job = accepted.json()
    assert accepted.status_code == 202
    assert accepted.headers["Location"] == f"/jobs/{job['id']}"
    assert (job["status"], job["method"], job["inventory"], job["num_examples"]) == ("queued", "mhr-z", "tiny", 8)
    assert api.get(accepted.headers["Location"]).json() == job


def test_the_same_key_gives_the_same_job_and_another_request_conflicts(api: httpx.Client) -> None:
    first = adapt(api, {"Idempotency-Key": "once"}).json()
    assert adapt(api, {"Idempotency-Key": "once"}).json()["id"] == first["id"]
    conflict = adapt(api, {"Idempotency-Key": "once"}, seed=1)
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "conflict")
    assert adapt(api, {"Idempotency-Key": "twice"}).json()["id"] != first["id"]
    assert adapt(api, {"Idempotency-Key": ""}).status_code == 422


def test_jobs_are_listed_newest_first_and_filtered(api: httpx.Client) -> None:
    ids = [adapt(api, task_id=task).json()["id"] for task in ("a", "b", "a")]
    assert [job["id"] for job in api.get("/jobs").json()["data"]] == ids[::-1]
    assert [job["id"] for job in api.get("/jobs", params={"task_id": "a"}).json()["data"]] == [ids[2], ids[0]]
    page = api.get("/jobs", params={"limit": 2}).json()
    rest = api.get("/jobs", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert [job["id"] for job in rest["data"]] == [ids[0]]
    assert rest["next_cursor"] is None
    assert api.get("/jobs", params={"status": "failed"}).json()["data"] == []


def test_a_queued_job_is_cancelled_at_once_and_only_once(api: httpx.Client) -> None:
    job = adapt(api).json()
    assert api.post(f"/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    again = api.post(f"/jobs/{job['id']}/cancel")
    assert (again.status_code, again.json()["error"]["type"]) == (409, "conflict")


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("method", "inventory", "kind"),
    [("mhr-z", None, "routing"), ("mhr", None, "adapter"), ("poly-mu", "flat", "adapter"), ("lora", None, "adapter")],
)
def test_a_job_learns_a_task_that_is_served(api: httpx.Client, method: str, inventory: str | None, kind: str) -> None:
    body = {"inventory": inventory} if inventory else {}
    job = adapt(
        api, method=method, promote="always", hyperparameters={"steps": 3}, instruction="Answer.", **body
    ).json()
    done = finished(api, job["id"])
    assert (done["status"], done["version"], done["error"]) == ("succeeded", 1, None), done
    assert {"loss_before", "loss_after"} <= set(done["metrics"])
    task = api.get("/tasks/new").json()
    assert (task["served_version"], task["instruction"]) == (1, "Answer.")
    [version] = task["versions"]
    assert (version["kind"], version["method"], version["job_id"]) == (kind, method, job["id"])
    answer = api.post("/generate", json={"task_id": "new", "inputs": "word 1", "parameters": {"max_new_tokens": 3}})
    assert (answer.status_code, answer.json()["version"]) == (200, 1)


@pytest.mark.usefixtures("worker")
def test_events_come_as_a_list_or_as_a_stream(api: httpx.Client) -> None:
    job = adapt(api, hyperparameters={"steps": 4}).json()
    with api.stream("GET", f"/jobs/{job['id']}/events", headers={"Accept": "text/event-stream"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        streamed = [line for line in response.iter_lines() if line.startswith("id: ")]
    listed = api.get(f"/jobs/{job['id']}/events").json()["data"]
    assert streamed == [f"id: {event['seq']}" for event in listed]
    assert [event["seq"] for event in listed] == list(range(1, len(listed) + 1))
    assert {"step", "validation"} <= {event["type"] for event in listed}
    later = api.get(f"/jobs/{job['id']}/events", params={"after": 2}).json()["data"]
    assert later == listed[2:]
    resumed = api.get(f"/jobs/{job['id']}/events", headers={"Accept": "text/event-stream", "Last-Event-ID": "2"})
    assert "id: 2\n" not in resumed.text
    assert "id: 3\n" in resumed.text


@pytest.mark.usefixtures("worker")
def test_never_promoted_versions_wait_for_a_promotion(api: httpx.Client) -> None:
    done = finished(api, adapt(api, promote="never", hyperparameters={"steps": 2}).json()["id"])
    assert done["version"] == 1
    refused = api.post("/generate", json={"task_id": "new", "inputs": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_served_version")
    assert api.post("/generate", json={"task_id": "new@1", "inputs": "x"}).status_code == 200
    api.post("/tasks/new/promote", json={"version": 1})
    assert api.post("/generate", json={"task_id": "new", "inputs": "x"}).json()["version"] == 1


@pytest.mark.usefixtures("worker")
def test_a_running_job_is_cancelled_after_its_step(api: httpx.Client) -> None:
    job = adapt(api, hyperparameters={"steps": 10_000, "patience": 1000}).json()
    while api.get(f"/jobs/{job['id']}").json()["status"] == "queued":
        time.sleep(0.02)
    api.post(f"/jobs/{job['id']}/cancel")
    done = finished(api, job["id"])
    assert (done["status"], done["version"]) == ("cancelled", None)
    assert api.get("/tasks/new").status_code == 404


@pytest.mark.usefixtures("worker")
def test_metrics_follow_the_jobs(api: httpx.Client) -> None:
    assert 'mhr_adapt_jobs{status="succeeded"} 0.0' in api.get("/metrics").text
    for _ in range(2):
        finished(api, adapt(api, hyperparameters={"steps": 3}).json()["id"])
        api.get("/metrics")
    text = api.get("/metrics").text
    assert 'mhr_adapt_jobs{status="succeeded"} 2.0' in text
    assert 'mhr_adapt_job_duration_seconds_count{method="mhr-z"} 2.0' in text
    assert "mhr_adapt_steps_total 6.0" in text
