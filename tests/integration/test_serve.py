"""The real server on the real backbone, over a real socket: lives of tasks, jobs and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.integration.conftest import Serve, ServerProcess

EXAMPLES = [
    {"input": f"{a} plus {b}", "output": str(a + b)} for a, b in ((1, 2), (2, 2), (3, 4), (5, 1), (4, 4), (2, 6))
]
GREEDY = {"max_new_tokens": 8, "logprobs": 0}


def adapt(client: httpx.Client, task: str, **body: Any) -> str:
    answer = client.post("/adapt", json={"task_id": task, "examples": EXAMPLES, "method": "mhr-z", **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def wait_for_job(client: httpx.Client, job_id: str, timeout_s: float = 480) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
        if job["status"] not in ("queued", "running"):
            return job
        assert time.monotonic() < deadline, job
        time.sleep(0.3)


def tokens(client: httpx.Client, task: str) -> list[int]:
    answer = client.post("/generate", json={"task_id": task, "inputs": "6 plus 2", "parameters": GREEDY})
    assert answer.status_code == 200, answer.text
    return [token["token_id"] for token in answer.json()["outputs"][0]["logprobs"]]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} still lives"
        time.sleep(0.1)


def test_a_task_is_learned_promoted_served_and_survives_a_restart(serve: Serve, data_dir: Path) -> None:
    server = serve()
    client = server.wait_ready()
    job_id = adapt(client, "sums", instruction="Add the numbers.", promote="never", hyperparameters={"steps": 4})
    job = wait_for_job(client, job_id)
    assert (job["status"], job["version"]) == ("succeeded", 1), job
    assert client.post("/generate", json={"task_id": "sums", "inputs": "x"}).status_code == 409
    assert client.post("/tasks/sums/promote", json={"version": 1}).json()["served_version"] == 1
    assert client.get("/tasks/sums").json()["versions"][0]["size_bytes"] < 60_000
    before = tokens(client, "sums")

    refused = subprocess.run(
        [sys.executable, "-m", "server", "serve"],
        env={**os.environ, "MHR_DATA_DIR": str(data_dir), "MHR_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused.returncode == 1
    assert f"in use by process {server.process.pid}" in refused.stderr
    assert tokens(client, "sums") == before

    worker = server.worker_pid()
    assert server.stop() == 0
    wait_until_gone(worker)

    client = serve().wait_ready()
    assert tokens(client, "sums") == before
    assert client.get(f"/jobs/{job_id}").json()["status"] == "succeeded"


def wait_for_checkpoint(server: ServerProcess, client: httpx.Client, job_id: str) -> None:
    """A checkpoint is written with every validation after the first."""

    def validated() -> bool:
        events = client.get(f"/jobs/{job_id}/events").json()["data"]
        return sum(event["type"] == "validation" for event in events) >= 4

    server.wait_for(validated)


def test_a_job_whose_worker_is_killed_goes_on_from_its_checkpoint(serve: Serve) -> None:
    server = serve()
    client = server.wait_ready()
    steps = {"steps": 20, "evaluate_every": 2, "patience": 100, "batch_size": 2, "refit": 0}
    job_id = adapt(client, "resumed", promote="always", hyperparameters=steps)
    wait_for_checkpoint(server, client, job_id)
    first = server.worker_pid()
    os.kill(first, signal.SIGKILL)
    assert tokens(client, "base")  # serving never noticed
    server.wait_for(lambda: server.worker_pid() != first)
    job = wait_for_job(client, job_id)
    assert (job["status"], job["attempts"], job["metrics"]["steps"]) == ("succeeded", 2, 20), job
    [resumed] = [e for e in client.get(f"/jobs/{job_id}/events").json()["data"] if e["type"] == "from_checkpoint"]
    assert resumed["data"]["step"] >= 2
    assert client.post("/generate", json={"task_id": "resumed", "inputs": "x"}).status_code == 200


def test_a_killed_server_leaves_no_worker_and_the_next_one_goes_on(serve: Serve) -> None:
    server = serve()
    client = server.wait_ready()
    steps = {"steps": 16, "evaluate_every": 2, "patience": 100, "batch_size": 2, "refit": 0}
    job_id = adapt(client, "carried-over", promote="always", hyperparameters=steps)
    wait_for_checkpoint(server, client, job_id)
    worker = server.worker_pid()
    server.process.kill()
    server.process.wait()
    wait_until_gone(worker)

    client = serve().wait_ready()
    job = wait_for_job(client, job_id)
    assert (job["status"], job["metrics"]["steps"]) == ("succeeded", 16), job


def test_sigterm_lets_a_request_in_flight_finish(serve: Serve) -> None:
    server = serve(MHR_WORKER="false")
    client = server.wait_ready()
    long = {"task_id": "base", "inputs": "Once upon a time", "raw_prompt": True}
    long["parameters"] = {"max_new_tokens": 40, "ignore_eos": True}  # type: ignore[assignment]
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(client.post("/generate", json=long)))
    asking.start()
    server.wait_for(lambda: "mhr_requests_running 1.0" in httpx.get(f"{client.base_url}/metrics").text)
    server.process.send_signal(signal.SIGTERM)
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 40
    assert server.process.wait(60) == 0
