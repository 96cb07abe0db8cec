"""Bad input gets the designed error, names the field, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.tiny_server import CONTEXT, LiveServer

EXAMPLES = [{"input": "a", "output": "b"}, {"input": "c", "output": ["d", "e"]}]


def generation(**body: Any) -> dict[str, Any]:
    return {"task_id": "capital", "inputs": "x", **body}


def adaptation(**body: Any) -> dict[str, Any]:
    return {"task_id": "t", "examples": EXAMPLES, **body}


def rows(*outputs: Any) -> list[dict[str, Any]]:
    return [{"input": "a", "output": output} for output in outputs]


TABLE: list[tuple[str, str, Any, int, str, str | None]] = [
    # generate
    ("POST", "/generate", generation(task_id="nobody"), 404, "not_found", "task_id"),
    ("POST", "/generate", generation(task_id="Not An Id"), 404, "not_found", "task_id"),
    ("POST", "/generate", generation(task_id="capital@9"), 404, "not_found", "task_id"),
    ("POST", "/generate", generation(task_id="capital@0"), 404, "not_found", "task_id"),
    ("POST", "/generate", generation(task_id="base@1"), 404, "not_found", "task_id"),
    ("POST", "/generate", generation(inputs=[]), 422, "invalid_request", "inputs"),
    ("POST", "/generate", generation(inputs=""), 422, "invalid_request", "inputs"),
    ("POST", "/generate", generation(inputs=["x", ""]), 422, "invalid_request", "inputs"),
    ("POST", "/generate", generation(inputs=["x", 5]), 422, "invalid_request", "inputs[1]"),
    ("POST", "/generate", generation(inputs={"text": "x"}), 422, "invalid_request", "inputs"),
    ("POST", "/generate", generation(input="x"), 422, "invalid_request", "input"),
    ("POST", "/generate", {"inputs": "x"}, 422, "invalid_request", "task_id"),
    ("POST", "/generate", generation(stream="yes"), 422, "invalid_request", "stream"),
    ("POST", "/generate", generation(parameters={"tokens": 5}), 422, "invalid_request", "parameters.tokens"),
    (
        "POST",
        "/generate",
        generation(parameters={"max_new_tokens": -1}),
        422,
        "invalid_request",
        "parameters.max_new_tokens",
    ),
    (
        "POST",
        "/generate",
        generation(parameters={"max_new_tokens": "5"}),
        422,
        "invalid_request",
        "parameters.max_new_tokens",
    ),
    ("POST", "/generate", generation(parameters={"top_p": 0}), 422, "invalid_request", "parameters.top_p"),
    ("POST", "/generate", generation(parameters={"n": True}), 422, "invalid_request", "parameters.n"),
    ("POST", "/generate", generation(parameters={"stop": ""}), 422, "invalid_request", "parameters.stop"),
    ("POST", "/generate", generation(parameters={"choices": []}), 422, "invalid_request", "parameters.choices"),
    ("POST", "/generate", generation(parameters={"choices": ["a", " "]}), 422, "invalid_request", "parameters.choices"),
    ("POST", "/generate", generation(parameters={"choices": ["a"], "n": 2}), 422, "invalid_request", "parameters"),
    ("POST", "/generate", generation(parameters={"choices": ["a"]}, stream=True), 422, "invalid_request", None),
    (
        "POST",
        "/generate",
        generation(parameters={"max_new_tokens": 4, "min_new_tokens": 5}),
        422,
        "invalid_request",
        "parameters.min_new_tokens",
    ),
    ("POST", "/generate", generation(inputs=["x"] * 300), 413, "too_large", "inputs"),
    ("POST", "/generate", generation(inputs=["x", "y" * 400]), 413, "too_large", "inputs[1]"),
    ("POST", "/generate", [], 400, "invalid_request", None),
    # adapt
    ("POST", "/adapt", adaptation(task_id="base"), 422, "invalid_request", "task_id"),
    ("POST", "/adapt", adaptation(task_id="mu"), 422, "invalid_request", "task_id"),
    ("POST", "/adapt", adaptation(task_id="Bad Id"), 422, "invalid_request", "task_id"),
    ("POST", "/adapt", adaptation(examples=EXAMPLES[:1]), 422, "invalid_request", "examples"),
    (
        "POST",
        "/adapt",
        adaptation(examples=[EXAMPLES[0], {"input": "a"}]),
        422,
        "invalid_request",
        "examples[1].output",
    ),
    ("POST", "/adapt", adaptation(examples=rows("b", "")), 422, "invalid_request", "examples[1].output"),
    ("POST", "/adapt", adaptation(examples=rows("b", "  ")), 422, "invalid_request", "examples[1].output"),
    ("POST", "/adapt", adaptation(examples=rows("b", [])), 422, "invalid_request", "examples[1].output"),
    ("POST", "/adapt", adaptation(examples=rows("b", ["c", ""])), 422, "invalid_request", "examples[1].output"),
    ("POST", "/adapt", adaptation(examples=rows("b", None)), 422, "invalid_request", "examples[1].output"),
    ("POST", "/adapt", adaptation(examples=rows("b") * 1001), 422, "invalid_request", "examples[1000]"),
    ("POST", "/adapt", adaptation(examples=rows("b", "c" * 300)), 422, "invalid_request", "examples[1]"),
    ("POST", "/adapt", adaptation(method="poly"), 422, "invalid_request", "method"),
    ("POST", "/adapt", adaptation(method="mhr", inventory="flat"), 422, "invalid_request", "method"),
    ("POST", "/adapt", adaptation(method="best"), 422, "invalid_request", "method"),
    ("POST", "/adapt", adaptation(method="lora", inventory="tiny"), 422, "invalid_request", "inventory"),
    ("POST", "/adapt", adaptation(inventory="none-such"), 404, "not_found", "inventory"),
    ("POST", "/adapt", adaptation(hyperparameters={"epochs": 2}), 422, "invalid_request", "hyperparameters.epochs"),
    ("POST", "/adapt", adaptation(hyperparameters={"steps": 0}), 422, "invalid_request", "hyperparameters.steps"),
    ("POST", "/adapt", adaptation(hyperparameters={"steps": "9"}), 422, "invalid_request", "hyperparameters.steps"),
    (
        "POST",
        "/adapt",
        adaptation(method="mhr-z", hyperparameters={"rank": 2}),
        422,
        "invalid_request",
        "hyperparameters.rank",
    ),
    (
        "POST",
        "/adapt",
        adaptation(method="lora", hyperparameters={"rank": 0}),
        422,
        "invalid_request",
        "hyperparameters.rank",
    ),
    ("POST", "/adapt", adaptation(validation={}), 422, "invalid_request", "validation"),
    ("POST", "/adapt", adaptation(validation={"fraction": 1.5}), 422, "invalid_request", "validation.fraction"),
    (
        "POST",
        "/adapt",
        adaptation(validation={"fraction": 0.5, "examples": EXAMPLES}),
        422,
        "invalid_request",
        "validation",
    ),
    ("POST", "/adapt", adaptation(promote="maybe"), 422, "invalid_request", "promote"),
    # tasks
    ("GET", "/tasks/nobody", None, 404, "not_found", "task_id"),
    ("GET", "/tasks/nobody/export", None, 404, "not_found", "task_id"),
    ("GET", "/tasks/base/export", None, 422, "invalid_request", "task_id"),
    ("GET", "/tasks?limit=0", None, 422, "invalid_request", "limit"),
    ("GET", "/tasks?page=2", None, 422, "invalid_request", "page"),
    ("PUT", "/tasks/base", {}, 422, "invalid_request", "task_id"),
    ("PUT", "/tasks/mu", {}, 422, "invalid_request", "task_id"),
    ("PUT", "/tasks/Upper", {}, 422, "invalid_request", "task_id"),
    ("PUT", "/tasks/t", {"kind": "adapter"}, 422, "invalid_request", "kind"),
    ("PUT", "/tasks/t", {"kind": "routing"}, 422, "invalid_request", None),
    ("PUT", "/tasks/t", {"kind": "mu", "routing": [[[0.0]]]}, 422, "invalid_request", None),
    ("PUT", "/tasks/t", {"kind": "routing", "routing": [[[0.0]]]}, 422, "invalid_request", "routing"),
    ("PUT", "/tasks/t", {"kind": "routing", "routing": [[[0.0], []]]}, 422, "invalid_request", "routing"),
    ("PUT", "/tasks/t", {"defaults": {"n": 2}}, 422, "invalid_request", "defaults.n"),
    ("PUT", "/tasks/t", {"defaults": {"min_new_tokens": 99}}, 422, "invalid_request", "defaults.min_new_tokens"),
    ("PUT", "/tasks/t", {"inventory": "none-such"}, 404, "not_found", "inventory"),
    ("PATCH", "/tasks/nobody", {"instruction": "x"}, 404, "not_found", "task_id"),
    ("PATCH", "/tasks/capital", {}, 422, "invalid_request", None),
    ("PATCH", "/tasks/mu", {"instruction": "x"}, 422, "invalid_request", "task_id"),
    ("DELETE", "/tasks/nobody", None, 404, "not_found", "task_id"),
    ("DELETE", "/tasks/base", None, 422, "invalid_request", "task_id"),
    ("POST", "/tasks/capital/promote", {"version": 9}, 404, "not_found", "task_id"),
    ("POST", "/tasks/capital/promote", {"version": 0}, 422, "invalid_request", "version"),
    # jobs, inventories, routes
    ("GET", "/jobs/job-0", None, 404, "not_found", "job_id"),
    ("GET", "/jobs/job-0/events", None, 404, "not_found", "job_id"),
    ("POST", "/jobs/job-0/cancel", None, 404, "not_found", "job_id"),
    ("GET", "/jobs?status=lost", None, 422, "invalid_request", "status"),
    ("GET", "/jobs?cursor=what", None, 422, "invalid_request", "cursor"),
    ("GET", "/inventories/none-such", None, 404, "not_found", "name"),
    ("GET", "/nowhere", None, 404, "not_found", None),
    ("GET", "/generate", None, 405, "method_not_allowed", None),
    ("GET", "/tasks/", None, 404, "not_found", None),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "type_", "param"),
    TABLE,
    ids=[f"{number}-{row[0]}-{row[3]}-{row[5]}" for number, row in enumerate(TABLE)],
)
def test_error_table(
    client: httpx.Client, method: str, path: str, body: Any, status: int, type_: str, param: str | None
) -> None:
    tasks, jobs = client.get("/tasks").json(), client.get("/jobs").json()
    answer = client.request(method, path, json=body) if body is not None else client.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, type_, param), error
    assert error["message"]
    assert error["code"]
    assert client.get("/tasks").json() == tasks
    assert client.get("/jobs").json() == jobs


def test_an_overlong_prompt_names_both_numbers(client: httpx.Client) -> None:
    answer = client.post("/generate", json=generation(task_id="base", inputs="y" * 400, raw_prompt=True))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (413, "context_exceeded")
    assert "400" in error["message"]
    assert str(CONTEXT) in error["message"]


def test_a_prompt_of_just_under_the_context_is_answered(client: httpx.Client) -> None:
    body = generation(task_id="base", inputs="y" * (CONTEXT - 1), raw_prompt=True)
    answer = client.post("/generate", json=body).json()
    assert answer["outputs"][0]["completion_tokens"] == 1
    body["inputs"] += "y"
    assert client.post("/generate", json=body).status_code == 413


def test_choices_that_do_not_fit_behind_the_prompt_are_too_large(client: httpx.Client) -> None:
    body = generation(task_id="base", inputs="y" * (CONTEXT - 4), raw_prompt=True, parameters={"choices": ["long one"]})
    answer = client.post("/generate", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "inputs[0]")


@pytest.mark.parametrize(
    "content", ['{"task_id": ', "", "nonsense", '{"a": NaN', "[" * 100_000, '{"a": ' + "9" * 5000 + "}"]
)
def test_malformed_json_is_400(client: httpx.Client, content: str) -> None:
    answer = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request"


def test_a_body_that_is_not_called_json_is_refused(client: httpx.Client) -> None:
    answer = client.post("/generate", content="task_id=capital", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400


@pytest.mark.parametrize("text", ["\x00", "\ud800", "\U0010ffff", "\u202e"])
def test_odd_characters_are_answered_or_refused_but_never_a_fault(client: httpx.Client, text: str) -> None:
    import json

    for method, path, body in (
        ("POST", "/generate", generation(inputs=f"x{text}y")),
        ("PUT", "/tasks/odd", {"instruction": f"x{text}y"}),
        ("PUT", "/tasks/odd", {"metadata": {text: text}}),
        ("POST", "/adapt", adaptation(examples=rows(f"b{text}", "c"))),
    ):
        answer = client.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (path, answer.text)


def test_nan_and_infinity_are_refused(client: httpx.Client) -> None:
    for value in ("NaN", "Infinity", "1e999"):
        content = f'{{"task_id": "base", "inputs": "x", "parameters": {{"temperature": {value}}}}}'
        answer = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "parameters.temperature")


def test_a_body_above_the_limit_is_413(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    client = connect(make_server(max_body_mb=1))
    announced = client.post("/generate", json=generation(inputs="y" * 2_000_000))
    chunked = client.post(
        "/generate",
        content=iter([b'{"task_id": "', *[b"y" * 500_000] * 4]),
        headers={"Content-Type": "application/json"},
    )
    for answer in (announced, chunked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert client.get("/healthz").status_code == 200


def test_a_full_queue_is_503_with_retry_after(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    live = make_server(max_queue=4, max_batch=1)
    client = connect(live)
    answer = client.post("/generate", json=generation(task_id="base", parameters={"n": 40}))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert client.post("/generate", json=generation(task_id="base")).status_code == 200
    assert 'mhr_rejections_total{reason="queue_full"}' in client.get("/metrics").text


def test_a_deadline_is_504(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    client = connect(make_server(request_timeout_s=0.2))
    slow = {"max_new_tokens": 240, "ignore_eos": True, "n": 128}
    answer = client.post("/generate", json=generation(task_id="base", parameters=slow))
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_blob_is_424_and_others_still_answer(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client], damage: str
) -> None:
    live = make_server(tasks=True)
    client = connect(live)
    version = live.runtime.store.get_version("capital")
    assert version.blob_digest is not None
    hurt(live.runtime.store.blobs.path(version.blob_digest), damage)
    answer = client.post("/generate", json=generation())
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (424, "adapter_unavailable", "blob_damaged")
    assert version.blob_digest in error["message"]
    assert client.post("/generate", json=generation(task_id="rhyme")).status_code == 200
    assert client.get("/tasks/capital/export").status_code == 424


def hurt(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-5] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


def test_a_task_without_a_served_version_is_409(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    live = make_server()
    live.runtime.store.put_task("unserved", instruction="", defaults={}, inventory=None, metadata={})
    answer = connect(live).post("/generate", json=generation(task_id="unserved"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_served_version")


def test_without_an_inventory_mu_is_404_and_base_answers(
    make_server: Callable[..., LiveServer], connect: Callable[[LiveServer], httpx.Client]
) -> None:
    client = connect(make_server())
    assert client.post("/generate", json=generation(task_id="mu")).status_code == 404
    assert client.post("/generate", json=generation(task_id="base")).status_code == 200
    assert client.put("/tasks/t", json={}).status_code == 422
    assert client.post("/adapt", json=adaptation()).json()["error"]["param"] == "inventory"
