from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.examples import Example, hold_out, read_examples, read_tasks
from tests.unit.training.conftest import WriteTask


def _lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_super_natural_instructions(write_task: WriteTask) -> None:
    folder = write_task("capital", [{"id": "1", "input": "France", "output": ["Paris", "paris"]}], "Name the capital.")
    (task,) = read_tasks(folder)
    assert (task.task, task.instruction, task.licence, task.source) == (
        "capital",
        "Name the capital.",
        "MIT",
        "made up",
    )
    assert task.examples == (Example("France", ("Paris", "paris")),)


def test_reads_plain_lines_of_several_tasks(tmp_path: Path) -> None:
    _lines(
        tmp_path / "mixed.jsonl",
        {"input": "a", "output": "b", "instruction": "Next."},
        {"input": "c", "output": ["d"]},
        {"task": "other", "input": "e", "output": "f"},
    )
    tasks = {task.task: task for task in read_tasks(tmp_path)}
    assert tasks["mixed"].examples == (Example("a", ("b",)), Example("c", ("d",)))
    assert tasks["mixed"].instruction == "Next."
    assert tasks["other"].examples == (Example("e", ("f",)),)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"input": "c"}, "row 2 has no output text"),
        ({"input": "c", "output": []}, "row 2 has no output text"),
        ({"input": "c", "output": [3]}, "row 2 has no output text"),
        ({"output": "d"}, "row 2 has no input text"),
        (["c", "d"], "row 2 is not a JSON object"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, complaint: str) -> None:
    path = _lines(tmp_path / "examples.jsonl", {"input": "a", "output": "b"}, row)
    with pytest.raises(InvalidInput, match=complaint):
        read_examples(path)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n{"input": ')
    with pytest.raises(InvalidInput, match="row 2 is not JSON"):
        read_examples(path)


def test_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes('{"input": "é", "output": "b"}'.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"not UTF-8 \(byte 11\)"):
        read_examples(path)


def test_a_task_without_instances_is_named(write_task: WriteTask) -> None:
    folder = write_task("capital", [])
    with pytest.raises(InvalidInput, match=r"capital\.json has no instances"):
        read_tasks(folder)


def test_a_task_that_occurs_twice_is_refused(write_task: WriteTask) -> None:
    folder = write_task("capital", [{"input": "France", "output": ["Paris"]}])
    _lines(folder / "more.jsonl", {"task": "capital", "input": "Spain", "output": "Madrid"})
    with pytest.raises(InvalidInput, match="'capital' occurs twice"):
        read_tasks(folder)


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no \*\.json or \*\.jsonl"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(("number", "fraction", "held"), [(24, 0.25, 6), (2, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9)])
def test_both_parts_of_a_split_have_examples(number: int, fraction: float, held: int) -> None:
    kept, held_out = hold_out(list(range(number)), fraction, list(reversed(range(number))))
    assert len(held_out) == held
    assert sorted(kept + held_out) == list(range(number))


def test_a_single_example_cannot_be_split() -> None:
    with pytest.raises(InvalidInput, match="at least two"):
        hold_out([1], 0.5, [0])
