from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from server import cli_pretrain
from server.adapters.inventory import Inventory
from server.cli import app
from server.settings import load_settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in ("say-x", "say-y"):
        rows = [{"input": str(i), "output": task[-1]} for i in range(8)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def mhr(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("MHR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MHR_BACKBONE", str(tiny_model))
    return CliRunner()


def _pretrain(mhr: CliRunner, data: Path, out: Path, *options: str) -> Result:
    return mhr.invoke(app, ["pretrain", "--data", str(data), "--out", str(out), "--steps", "4", *options])


def test_every_option_reaches_the_run(mhr: CliRunner, data: Path, tmp_path: Path) -> None:
    options = (
        "--method poly --skills 3 --rank 2 --alpha 8 --batch-size 4 --accumulate 2 --optimizer adafactor"
        " --adapter-lr 0.01 --routing-lr 0.2 --noise --task-sampling temperature --temperature 3 --rows-per-task 2"
        " --seed 5 --checkpoint-every 2 --alignment-every 2 --alignment-tasks 2"
    )
    result = _pretrain(mhr, data, tmp_path / "poly", *options.split(), "--json")
    assert result.exit_code == 0, result.output
    written = {name: Path(path) for name, path in json.loads(result.stdout).items()}
    training = Inventory.from_bytes(written["inventory"].read_bytes()).training
    of_the_run = options.replace(" --checkpoint-every 2 --alignment-every 2 --alignment-tasks 2", "")
    given = of_the_run.replace(" --noise", "").split()
    for option, value in zip(given[::2], given[1::2], strict=True):
        assert str(training[option[2:].replace("-", "_")]).removesuffix(".0") == value
        assert f"{option} {value}" in written["card"].read_text()
    assert training["noise"]

    picture = tmp_path / "alignment.png"
    assert mhr.invoke(app, ["plot", "alignment", str(tmp_path / "poly"), "--out", str(picture)]).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("batch_size", "rows"), [(8, 4), (6, 2), (3, 1)])
def test_as_many_rows_of_a_task_stand_together_as_the_batch_allows_up_to_four(
    mhr: CliRunner, data: Path, tmp_path: Path, batch_size: int, rows: int
) -> None:
    result = _pretrain(mhr, data, tmp_path / "out", "--batch-size", str(batch_size), "--json")
    assert result.exit_code == 0, result.output
    inventory = Inventory.from_bytes(Path(json.loads(result.stdout)["inventory"]).read_bytes())
    assert inventory.training["rows_per_task"] == rows


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--method poly --heads 8", "mhr: the method poly has one head, not 8; leave heads out"),
        ("--method soup", "mhr: unknown method 'soup'; choose among mhr, poly, shared, private"),
        ("--optimizer sgd", "mhr: unknown optimizer 'sgd'; choose among adamw, adafactor"),
        ("--task-sampling zipf", "mhr: unknown task_sampling 'zipf'; choose among proportional, uniform, temperature"),
        ("--temperature 2", "mhr: a temperature is for task sampling by temperature, not proportional; leave one out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    mhr: CliRunner, data: Path, tmp_path: Path, options: str, complaint: str
) -> None:
    result = _pretrain(mhr, data, tmp_path / "out", *options.split())
    assert (result.exit_code, result.stderr.strip()) == (1, complaint)
    assert not (tmp_path / "out").exists()


def test_a_gpu_is_taken_where_there_is_one_unless_the_device_is_set(
    mhr: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli_pretrain._device(load_settings()) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli_pretrain._device(load_settings()) == "cuda"
    monkeypatch.setenv("MHR_DEVICE", "cpu")
    assert cli_pretrain._device(load_settings()) == "cpu"
