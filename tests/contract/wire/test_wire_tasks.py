"""/tasks and /inventories on the wire."""

from __future__ import annotations

import io
import json
import tarfile
from typing import Any

import httpx
import pytest
import safetensors.torch

from adapters_store.store import Store
from tests.support.tiny_server import LiveServer

GREEDY = {"max_new_tokens": 10, "logprobs": 0}


def routing_like(client: httpx.Client, value: float, inventory: str = "tiny") -> list[list[list[float]]]:
    about = client.get(f"/inventories/{inventory}").json()
    return [[[value] * about["num_skills"] for _ in range(about["num_heads"])] for _ in about["linears"]]


def answer_of(client: httpx.Client, task: str, text: str = "a question") -> list[int]:
    body = {"task_id": task, "inputs": text, "raw_prompt": True, "parameters": GREEDY}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return [token["token_id"] for token in answer.json()["outputs"][0]["logprobs"]]


def test_put_creates_then_replaces(client: httpx.Client) -> None:
    body = {"instruction": "Say it.", "kind": "mu", "defaults": {"max_new_tokens": 4}, "metadata": {"team": "a"}}
    created = client.put("/tasks/put-me", json=body)
    assert created.status_code == 201
    assert created.json()["served_version"] == 1
    assert created.json()["inventory"] == "tiny"
    again = client.put("/tasks/put-me", json=body)
    assert (again.status_code, len(again.json()["versions"])) == (200, 1)  # the same content is the same version
    other = client.put("/tasks/put-me", json={"kind": "routing", "routing": routing_like(client, 1.0)})
    assert [version["kind"] for version in other.json()["versions"]] == ["mu", "routing"]
    assert (other.json()["served_version"], other.json()["instruction"]) == (2, "")
    assert answer_of(client, "put-me@1") == answer_of(client, "mu")


def test_equal_logits_are_the_mean_and_others_are_not(client: httpx.Client) -> None:
    client.put("/tasks/zero", json={"kind": "routing", "routing": routing_like(client, 0.0)})
    assert answer_of(client, "zero") == answer_of(client, "mu")
    skewed = routing_like(client, 0.0)
    skewed = [[[60.0, *head[1:-1], -60.0] for head in linear] for linear in skewed]
    client.put("/tasks/skewed", json={"kind": "routing", "routing": skewed})
    assert answer_of(client, "skewed") != answer_of(client, "mu")


def test_a_task_may_use_another_inventory(client: httpx.Client) -> None:
    client.put("/tasks/flat-mean", json={"inventory": "flat"})
    assert client.get("/tasks/flat-mean").json()["inventory"] == "flat"
    assert answer_of(client, "flat-mean") != answer_of(client, "mu")


def test_lists_are_paged_in_order(client: httpx.Client) -> None:
    for number in range(5):
        client.put(f"/tasks/page-{number}", json={})
    found: list[str] = []
    query: dict[str, Any] = {"prefix": "page-", "limit": 2}
    while True:
        page = client.get("/tasks", params=query).json()
        found += [task["id"] for task in page["data"]]
        if page["next_cursor"] is None:
            break
        query["cursor"] = page["next_cursor"]
    assert found == [f"page-{number}" for number in range(5)]


def test_patch_changes_what_it_names(client: httpx.Client) -> None:
    client.put("/tasks/patched", json={"instruction": "old", "defaults": {"max_new_tokens": 4}})
    task = client.patch("/tasks/patched", json={"instruction": "new"}).json()
    assert (task["instruction"], task["defaults"]) == ("new", {"max_new_tokens": 4})
    task = client.patch("/tasks/patched", json={"defaults": {"stop": ["\n"]}, "metadata": {"a": [1]}}).json()
    assert (task["instruction"], task["defaults"], task["metadata"]) == ("new", {"stop": ["\n"]}, {"a": [1]})
    answer = client.post("/generate", json={"task_id": "patched", "inputs": "x", "parameters": {"max_new_tokens": 1}})
    assert answer.json()["usage"]["prompt_tokens"] == len("Definition: new\n\nInput: x\n\nOutput:")


def test_a_deleted_task_is_gone(client: httpx.Client) -> None:
    client.put("/tasks/short-lived", json={})
    deleted = client.delete("/tasks/short-lived")
    assert (deleted.status_code, deleted.content) == (204, b"")
    for answer in (
        client.get("/tasks/short-lived"),
        client.delete("/tasks/short-lived"),
        client.post("/generate", json={"task_id": "short-lived", "inputs": "x"}),
    ):
        assert answer.status_code == 404


def test_promotion_holds_for_the_next_request_and_old_versions_stay(client: httpx.Client) -> None:
    client.put("/tasks/promoted", json={"kind": "mu"})
    client.put("/tasks/promoted", json={"inventory": "flat", "kind": "mu"})
    second = answer_of(client, "promoted")
    task = client.post("/tasks/promoted/promote", json={"version": 1}).json()
    assert task["served_version"] == 1
    first = answer_of(client, "promoted")
    assert first == answer_of(client, "mu") != second
    assert answer_of(client, "promoted@2") == second


def test_a_promotion_by_another_process_is_seen_at_once(client: httpx.Client, shared_server: LiveServer) -> None:
    client.put("/tasks/elsewhere", json={"kind": "mu"})
    before = answer_of(client, "elsewhere")
    with Store.open(shared_server.runtime.settings.data_dir) as other:
        other.register_task(
            "elsewhere", instruction="", defaults={}, inventory="flat", metadata={}, kind="mu", blob=None
        )
    assert answer_of(client, "elsewhere") != before


@pytest.mark.parametrize("task", ["capital", "capital@1", "mu"])
def test_export_is_a_peft_lora_checkpoint(client: httpx.Client, task: str) -> None:
    answer = client.get(f"/tasks/{task}/export")
    assert answer.headers["content-type"] == "application/x-tar"
    name = {"mu": "mu"}.get(task, "capital-v1")
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == [f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors"]
        files = {entry.name.split("/")[1]: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert len(safetensors.torch.load(files["adapter_model.safetensors"])) == 2 * len(config["target_modules"])


def test_a_version_can_be_exported(client: httpx.Client) -> None:
    assert client.get("/tasks/capital/export", params={"version": 1}).status_code == 200
    assert client.get("/tasks/capital/export", params={"version": 9}).status_code == 404


def test_inventories_tell_their_shapes_and_tasks(client: httpx.Client) -> None:
    listed = client.get("/inventories").json()["data"]
    assert [(item["name"], item["num_heads"], item["served"], item["fits"]) for item in listed] == [
        ("flat", 1, False, True),
        ("tiny", 4, True, True),
    ]
    detail = client.get("/inventories/tiny").json()
    assert (detail["num_skills"], detail["rank"], detail["tasks"]) == (3, 2, ["capital", "rhyme"])
    assert detail["linears"]["model.layers.0.self_attn.k_proj"] == [32, 16]
    assert detail["size_bytes"] > 0
