"""The first start: an empty data directory, the bundled inventory, and a task learned from real examples."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.training.examples import read_tasks
from tests.integration.conftest import ServerProcess
from tests.integration.test_serve import wait_for_job

INVENTORY = "smollm2-135m-mhr"
HELD_OUT = "task1195_disflqa_disfluent_to_fluent_conversion"


@pytest.fixture(scope="module")
def client(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server whose data directory has nothing but the dequantised backbone, which another test has made."""
    empty = tmp_path_factory.mktemp("empty")
    (empty / "backbones").symlink_to(data_dir / "backbones")
    server = ServerProcess(empty)
    yield server.wait_ready()
    server.stop(signal.SIGKILL)


def test_the_training_tasks_are_served_under_their_own_names(client: httpx.Client) -> None:
    inventory = client.get(f"/inventories/{INVENTORY}").json()
    assert (inventory["num_skills"], inventory["num_heads"]) == (8, 8)
    assert len(client.get("/tasks", params={"limit": 100}).json()["data"]) == 43
    task = client.get("/tasks/task1217_atomic_answer_generation").json()
    assert task["instruction"].startswith("In this task,")
    assert task["served_version"] == 1


def test_a_mixed_batch_answers_each_task_as_it_was_trained(client: httpx.Client) -> None:
    asked = {
        "task1146_country_capital": ("France", ["Paris", "Africa", "Yes"]),
        "task1321_country_continent": ("Kenya", ["Paris", "Africa", "Yes"]),
        "task1210_atomic_classification_madeupof": ("Head: bread<sep>Tail: flour", ["Paris", "Africa", "Yes"]),
    }
    best = []
    for task, (text, choices) in asked.items():
        answer = client.post("/generate", json={"task_id": task, "inputs": text, "parameters": {"choices": choices}})
        assert answer.status_code == 200, answer.text
        best.append(answer.json()["outputs"][0]["text"])
    assert best == ["Paris", "Africa", "Yes"]


def test_a_routing_learned_from_real_examples_is_small_better_and_served(client: httpx.Client) -> None:
    if "MHR_TEST_DATA" not in os.environ:
        pytest.skip("set MHR_TEST_DATA to a folder with superni/test, tasks of Super-NaturalInstructions")
    tasks = {task.task: task for task in read_tasks(Path(os.environ["MHR_TEST_DATA"]) / "superni" / "test")}
    task = tasks[HELD_OUT]
    body = {
        "task_id": "fluent-questions",
        "instruction": task.instruction,
        "examples": [{"input": e.input, "output": list(e.outputs)} for e in task.examples[:24]],
        "method": "mhr-z",
        "hyperparameters": {"steps": 20},
    }
    job = wait_for_job(client, client.post("/adapt", json=body).json()["id"])
    assert job["status"] == "succeeded", job
    assert job["metrics"]["loss_after"] < 0.8 * job["metrics"]["loss_before"]
    learned = client.get("/tasks/fluent-questions").json()
    assert learned["served_version"] == 1
    assert learned["versions"][0]["kind"] == "routing"
    assert learned["versions"][0]["size_bytes"] < 60_000
    question = task.examples[30].input
    answer = client.post("/generate", json={"task_id": "fluent-questions", "inputs": question}).json()
    assert answer["outputs"][0]["finish_reason"] == "stop"
    assert answer["outputs"][0]["text"].endswith("?")
