from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.pretrain import PretrainConfig, PretrainProgress, pretrain, read_log
from server.training.trainer import TrainerConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, answer in (("say-x", "x"), ("say-y", "y")):
        rows = [{"input": f"{i}", "output": answer, "instruction": f"Say {answer}."} for i in range(10)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _config(data: Path, out: Path, **changes: object) -> PretrainConfig:
    settings = {"num_skills": 2, "num_heads": 2, "rank": 2, "batch_size": 4, "checkpoint_every": 3, **changes}
    return PretrainConfig(data, out, trainer=TrainerConfig(steps=10, adapter_lr=1e-2), **settings)


def test_learns_an_inventory_with_the_tasks_routings_and_a_card(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    path = pretrain(_config(data, tmp_path / "out"), backbone)
    assert path is not None
    inventory = Inventory.from_bytes(path.read_bytes())
    assert inventory.backbone_fingerprint == backbone.fingerprint
    assert (inventory.num_skills, inventory.num_heads, inventory.rank) == (2, 2, 2)
    assert inventory.tasks["say-x"].instruction == "Say x."
    assert list(inventory.routings) == ["say-x", "say-y"]
    training = inventory.training
    assert all(training["validation_after"][task] < training["validation_before"][task] for task in inventory.tasks)
    card = (tmp_path / "out" / "card.md").read_text()
    assert "mhr pretrain --data DATA --out OUT --steps 10" in card
    assert "| say-x |" in card


def test_a_stopped_run_goes_on_as_if_it_had_not_been(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    pretrain(_config(data, whole), backbone)
    asked = iter(range(100))
    assert pretrain(_config(data, halved), backbone, should_stop=lambda: next(asked) >= 4) is None
    # Steps after the last checkpoint, as a killed run would leave them in its log, are done again.
    with (halved / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 9, "loss": 99.0, "seconds": 0.0}) + "\n")
    seen: list[PretrainProgress] = []
    pretrain(_config(data, halved), backbone, on_progress=seen.append)
    assert [progress.step for progress in seen] == [5, 6, 7, 8, 9, 10]
    assert [r.get("loss") for r in read_log(halved)] == [r.get("loss") for r in read_log(whole)]
    assert (halved / "inventory.safetensors").read_bytes() == (whole / "inventory.safetensors").read_bytes()


def test_heads_that_do_not_divide_are_refused_with_the_linears_name(
    backbone: Backbone, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=r"5 heads do not divide the linear 'model\.layers\.0\."):
        pretrain(_config(data, tmp_path / "out", num_heads=5), backbone)


def test_a_place_that_cannot_be_written_stops_with_a_sentence(backbone: Backbone, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidInput, match="cannot write to"):
        pretrain(_config(data, tmp_path / "out"), backbone)


def test_impossible_sizes_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="num_skills must be at least 1"):
        _config(data, tmp_path, num_skills=0)
