from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.adapt import Hyperparameters
from server.training.evaluate import EvaluateConfig, Score, as_document, evaluate, table


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"input": f"{i}", "output": "yes yes", "instruction": "Say yes."} for i in range(16)]
    (folder / "say-yes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_was_learnt_answers_better_than_what_was_not(backbone: Backbone, inventory: Inventory, data: Path) -> None:
    config = EvaluateConfig(
        data,
        methods=("base", "mu", "mhr"),
        num_examples=8,
        num_instances=6,
        max_new_tokens=10,
        hyperparameters=Hyperparameters(steps=40, adapter_lr=2e-2, evaluate_every=10),
    )
    seen: list[Score] = []
    scores = evaluate(config, backbone, backbone, inventory, seen.append)
    assert seen == scores
    by_method = {score.method: score for score in scores}
    assert by_method["mhr"].rouge_l == 100.0
    assert by_method["mhr"].exact_match == 100.0
    assert by_method["base"].rouge_l < 50
    assert by_method["mu"].rouge_l < 50
    assert by_method["mhr"].metrics["train_examples"] == 6
    assert "| say-yes | " in table(scores)
    assert json.loads(json.dumps(as_document(config, scores)))["config"]["num_examples"] == 8


def test_the_table_has_the_mean_over_seeds_and_tasks() -> None:
    scores = [
        Score(task, "mu", seed, value, 0.0, 10, {})
        for task, seed, value in [("a", 0, 10.0), ("a", 1, 20.0), ("b", 0, 40.0), ("b", 1, 50.0)]
    ]
    assert table(scores).splitlines() == [
        "| task | mu |",
        "|---|---|",
        "| a | 15.0 |",
        "| b | 45.0 |",
        "| mean | 30.0 |",
    ]


def test_too_few_instances_are_named(backbone: Backbone, data: Path) -> None:
    with pytest.raises(InvalidInput, match="'say-yes' has 16 instances; 124 are needed"):
        evaluate(EvaluateConfig(data, methods=("base",)), backbone, backbone, None)


def test_unknown_methods_are_refused_with_the_known_ones(data: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\['soup'\]; choose among base, mu, mhr"):
        EvaluateConfig(data, methods=("soup",))


def test_a_method_that_needs_an_inventory_says_so(backbone: Backbone, data: Path) -> None:
    config = EvaluateConfig(data, methods=("mu",), num_examples=4, num_instances=4)
    with pytest.raises(InvalidInput, match="--inventory"):
        evaluate(config, backbone, backbone, None)
