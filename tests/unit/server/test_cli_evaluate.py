from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from server.backbone import Backbone
from server.cli import app
from tests.support.tiny_server import random_inventory


@pytest.fixture
def mhr(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("MHR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MHR_BACKBONE", str(tiny_model))
    return CliRunner()


def run(mhr: CliRunner, *arguments: object, command: str = "evaluate", code: int = 0) -> Result:
    result = mhr.invoke(app, [command, *(str(argument) for argument in arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("one", "two"):
        rows = [{"input": f"{i}", "output": "x", "instruction": "Say x."} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def inventory_files(backbone: Backbone, tmp_path: Path) -> tuple[Path, Path]:
    many, flat = tmp_path / "many.safetensors", tmp_path / "flat.safetensors"
    many.write_bytes(random_inventory(backbone).to_bytes())
    flat.write_bytes(random_inventory(backbone, num_heads=1).to_bytes())
    return many, flat


def test_several_inventories_budgets_and_hyperparameters_in_one_run(
    mhr: CliRunner, tasks: Path, inventory_files: tuple[Path, Path], tmp_path: Path
) -> None:
    many, flat = inventory_files
    arguments = (
        "--data", tasks, "--inventory", many, "--inventory", f"flat={flat}", "--methods", "base,mhr-z,poly-mu@flat",
        "--tasks", "two", "--examples", "2,4", "--instances", 3, "--seeds", 2, "--max-new-tokens", 2,
        "--hyperparameters", '{"steps": 2}', "--hyperparameters", 'poly-mu={"steps": 1}', "--out", tmp_path / "run",
    )  # fmt: skip
    shown = run(mhr, *arguments).stdout
    assert "ROUGE-L in percent after 2 examples" in shown
    assert "| poly-mu@flat |" in shown
    document = json.loads(run(mhr, *arguments, "--json").stdout)
    assert len(document["scores"]) == 2 * (1 + 2 * 2)
    steps = {score["method"]: score["adaptation"].get("steps") for score in document["scores"]}
    assert steps == {"base": None, "mhr-z": 2, "poly-mu@flat": 1}
    assert {score["task"] for score in document["scores"]} == {"two"}


def test_without_a_folder_nothing_is_left_behind(
    mhr: CliRunner, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", tasks, "--methods", "base", "--examples", 2, "--instances", 2, "--max-new-tokens", 2)
    assert "| base |" in run(mhr, *arguments).stdout
    assert set(tmp_path.iterdir()) - before == {tmp_path / "data"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--methods", "mu"], "needs an inventory; name it with --inventory PATH"),
        (["--examples", "8,x"], "'x' is not a number; write for example 8,32"),
        (["--hyperparameters", "mhr"], "'mhr' is not JSON or METHOD=JSON"),
        (["--hyperparameters", "mhr=3"], "'mhr=3' is not an object"),
        (["--tasks", "three"], "no task three in"),
        (["--inventory", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(mhr: CliRunner, tasks: Path, arguments: list[str], reason: str) -> None:
    output = run(mhr, "--data", tasks, "--methods", "base", *arguments, code=1).output
    assert reason in output
    assert "Traceback" not in output


def test_an_inventory_given_twice_is_refused(mhr: CliRunner, tasks: Path, inventory_files: tuple[Path, Path]) -> None:
    many, flat = inventory_files
    output = run(mhr, "--data", tasks, "--inventory", many, "--inventory", flat, code=1).output
    assert "given twice; write NAME=PATH" in output


def test_runs_are_reported_together_as_table_json_and_plot(mhr: CliRunner, tasks: Path, tmp_path: Path) -> None:
    for task in ("one", "two"):
        output = run(
            mhr, "--data", tasks, "--tasks", task, "--methods", "base,demos", "--examples", 2, "--instances", 2,
            "--max-new-tokens", 2, "--out", tmp_path / task, "--plot", tmp_path / f"{task}.png", "--against", "demos",
        ).stdout  # fmt: skip
        assert "| ahead of demos |" in output
        assert (tmp_path / f"{task}.png").read_bytes().startswith(b"\x89PNG")
    both = (tmp_path / "one", tmp_path / "two", "--plot", tmp_path / "both.svg")
    assert "| method | one | two | mean |" in run(mhr, *both, command="evaluate-report").stdout
    assert "| ahead of base |" in run(mhr, *both, "--against", "base", command="evaluate-report").stdout
    assert "no scores of 'mhr'" in run(mhr, *both, "--against", "mhr", command="evaluate-report", code=1).output
    assert (tmp_path / "both.svg").exists()
    document = json.loads(run(mhr, *both[:2], "--json", command="evaluate-report").stdout)
    assert len(document["scores"]) == 4
    assert set(document["settings"]["tasks"]) == {"one", "two"}


def test_a_plot_of_an_unknown_format_is_refused_before_the_work(mhr: CliRunner, tasks: Path, tmp_path: Path) -> None:
    output = run(mhr, "--data", tasks, "--methods", "base", "--plot", "a.txt", "--out", tmp_path / "r", code=1).output
    assert "ends with none of these" in output
    assert not (tmp_path / "r").exists()


def test_a_method_that_is_not_in_the_run_is_refused_before_the_work(
    mhr: CliRunner, tasks: Path, tmp_path: Path
) -> None:
    output = run(mhr, "--data", tasks, "--methods", "base", "--against", "lora", "--out", tmp_path / "r", code=1).output
    assert "'lora' is not among --methods; name one of base" in output
    assert not (tmp_path / "r").exists()


def test_a_folder_that_is_no_run_is_refused(mhr: CliRunner, tmp_path: Path) -> None:
    assert "holds no scores" in run(mhr, tmp_path, command="evaluate-report", code=1).output
