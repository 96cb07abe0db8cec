from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import BackboneMismatch, InvalidInput
from server.training.evaluate import evaluate
from server.training.evaluation_plan import BackboneSource, EvaluateConfig, Plan
from server.training.scores import Score
from tests.support.tiny_server import random_inventory

FAST = {"steps": 40, "adapter_lr": 2e-2, "evaluate_every": 10}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"input": f"{i}", "output": "yes yes", "instruction": "Say yes."} for i in range(16)]
    (folder / "say-yes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(data: Path, tiny_folder: Path, cache_dir: Path, inventory: Inventory, monkeypatch: Any) -> EvaluateConfig:
    # fp32 on every processor, so that the numbers below do not depend on it.
    monkeypatch.setattr("server.training.evaluation_plan.training_dtype", lambda device: torch.float32)
    return EvaluateConfig(
        data,
        BackboneSource(str(tiny_folder), cache_dir),
        methods=("base", "mu", "mhr"),
        inventories={"": inventory.to_bytes(torch.float32)},
        num_examples=(8,),
        num_instances=6,
        max_new_tokens=10,
        hyperparameters={"": FAST},
    )


def test_what_was_learnt_answers_better_than_what_was_not(config: EvaluateConfig, tmp_path: Path) -> None:
    seen: list[Score] = []
    scores = evaluate(config, tmp_path / "run", on_score=seen.append)
    assert seen == scores
    base, mu, mhr = scores
    assert [(score.method, score.examples) for score in scores] == [("base", 0), ("mu", 0), ("mhr", 8)]
    assert mhr.score == mhr.exact_match == 100.0
    assert base.score < 50
    assert mu.score < 50
    assert (mhr.metric, mhr.instances, mhr.device) == ("rouge_l", 6, "cpu")
    assert mhr.adaptation["train_examples"] == 6
    assert not base.adaptation


def test_every_method_of_the_comparison_runs(config: EvaluateConfig, backbone: Backbone, tmp_path: Path) -> None:
    flat = random_inventory(backbone, num_heads=1).to_bytes()
    config = replace(
        config,
        methods=(
            "base",
            "demos",
            "mu",
            "mhr",
            "mhr-z",
            "mhr-mu",
            "mu@poly",
            "poly@poly",
            "poly-z@poly",
            "poly-mu@poly",
            "lora",
        ),
        inventories={**config.inventories, "poly": flat},
        num_examples=(2, 8),
        num_instances=2,
        max_new_tokens=2,
        seeds=(0, 1),
        hyperparameters={"": {"steps": 1}, "lora": {"rank": 2}},
    )
    scores = evaluate(config, tmp_path / "run")
    assert len(scores) == 2 * (3 + 8 * 2)
    parameters = {score.method: score.adaptation.get("trained_parameters") for score in scores}
    assert parameters["mhr"] > parameters["mhr-mu"] > parameters["mhr-z"] > parameters["poly-z@poly"] > 0
    shown = {score.examples: score.demonstrations for score in scores if score.method == "demos"}
    assert shown == {2: 2.0, 8: 7.0}  # the context holds no more
    assert all(score.demonstrations == 0 for score in scores if score.method != "demos")


def test_a_run_goes_on_where_it_stopped(config: EvaluateConfig, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(score: Score) -> None:
        if score.method == "mu":
            raise Interrupted

    starts: list[tuple[int, int]] = []
    with pytest.raises(Interrupted):
        evaluate(config, tmp_path / "run", on_start=lambda *counts: starts.append(counts), on_score=stop)
    again: list[Score] = []
    scores = evaluate(config, tmp_path / "run", on_start=lambda *counts: starts.append(counts), on_score=again.append)
    assert starts == [(0, 3), (2, 3)]
    assert [score.method for score in again] == ["mhr"]
    assert [score.method for score in scores] == ["base", "mu", "mhr"]
    assert len((tmp_path / "run" / "scores.jsonl").read_text().splitlines()) == 3


def test_a_finished_run_loads_no_backbone(config: EvaluateConfig, tmp_path: Path, monkeypatch: Any) -> None:
    config = replace(config, methods=("base",))
    scores = evaluate(config, tmp_path / "run")
    monkeypatch.delattr("server.training.evaluation_plan.load_backbone")
    assert evaluate(config, tmp_path / "run") == scores


def test_other_settings_are_refused_and_more_seeds_are_not(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, methods=("base",))
    evaluate(config, tmp_path / "run")
    assert len(evaluate(replace(config, seeds=(0, 1)), tmp_path / "run")) == 2
    with pytest.raises(InvalidInput, match="made with other settings: protocol, instances: 6, now 5"):
        evaluate(replace(config, num_instances=5), tmp_path / "run")


def test_only_hyperparameters_that_a_method_uses_are_compared(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, methods=("mhr-z",), hyperparameters={"": {**FAST, "rank": 2}})
    scores = evaluate(config, tmp_path / "run")
    assert evaluate(replace(config, hyperparameters={"": {**FAST, "rank": 3}}), tmp_path / "run") == scores
    with pytest.raises(InvalidInput, match="routing_lr"):
        evaluate(replace(config, hyperparameters={"": {**FAST, "routing_lr": 0.5}}), tmp_path / "run")


def test_processes_find_what_one_finds(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, methods=("base", "mu"), seeds=(0, 1))
    one = evaluate(config, tmp_path / "one")
    several = evaluate(config, tmp_path / "several", num_workers=2)
    assert several == one


def test_an_error_in_a_process_is_the_same_error(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, backbone=BackboneSource(str(tmp_path / "nowhere"), config.backbone.cache_dir))
    with pytest.raises(InvalidInput, match="neither a local directory"):
        evaluate(config, tmp_path / "run", num_workers=2)


def test_rank_classification_is_scored_by_accuracy(config: EvaluateConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sets" / "XOR"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["yes", "no"]')
    for part, count in {"train": 40, "test": 6}.items():
        rows = [{"sentence": f"{part} {i}", "label": "yes"} for i in range(count)]
        (folder / f"{part}.json").write_text(json.dumps(rows))
    config = replace(config, data=folder, methods=("base", "demos", "mhr"), num_instances=100)
    scores = evaluate(config, tmp_path / "run")
    assert {(score.task, score.metric, score.instances) for score in scores} == {("XOR", "accuracy", 6)}
    assert scores[-1].score == scores[-1].exact_match == 100.0


def test_an_inventory_of_another_backbone_is_refused(
    config: EvaluateConfig, inventory: Inventory, tmp_path: Path
) -> None:
    other = replace(inventory, backbone_fingerprint="f" * 64).to_bytes()
    with pytest.raises(BackboneMismatch, match=r"'' belongs to the backbone .* fingerprint ffffffffffff; this one"):
        evaluate(replace(config, methods=("mu",), inventories={"": other}), tmp_path / "run")


def test_what_is_wrong_is_known_before_anything_runs(config: EvaluateConfig, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'say-yes' has 16 instances; 24 examples"):
        evaluate(replace(config, num_examples=(8, 24)), tmp_path / "run")
    with pytest.raises(InvalidInput, match="at least 2 examples"):
        replace(config, num_examples=(1,))
    with pytest.raises(InvalidInput, match="at least one instance"):
        replace(config, num_instances=0)
    assert not (tmp_path / "run").exists()


def test_a_column_is_prompted_as_its_inventory_was_trained(config: EvaluateConfig) -> None:
    plan = Plan.read(config)
    assert {plan.prompt_format(column) for column in plan.columns.values()} == {"definition-input-output"}


def test_nothing_of_the_server_or_the_store_is_imported() -> None:
    others = ("fastapi", "sqlalchemy", "uvicorn", "prometheus_client", "structlog", "pydantic_settings")
    code = f"import sys, server.training.evaluate; print([name for name in {others} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
