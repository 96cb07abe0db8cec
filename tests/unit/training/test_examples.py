from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.examples import Example, hold_out, read_tasks
from tests.unit.training.conftest import WriteTask


def _lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _examples(path: Path) -> list[Example]:
    (task,) = read_tasks(path.parent)
    return list(task.examples)


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
        ({"input": "c", "output": "d", "task": 3}, "row 2: the task must be a text"),
        ({"input": "c", "output": "d", "instruction": ["e"]}, "row 2: the instruction must be a text"),
        ({"input": "c", "output": "d", "instruction": "Other."}, "row 2: task 'examples' has another instruction"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: object, complaint: str) -> None:
    _lines(tmp_path / "examples.jsonl", {"input": "a", "output": "b"}, row)
    with pytest.raises(InvalidInput, match=complaint):
        read_tasks(tmp_path)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n{"input": ')
    with pytest.raises(InvalidInput, match="row 2 is not JSON"):
        read_tasks(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes('{"input": "é", "output": "b"}\n'.encode("utf-8-sig"))
    assert _examples(path) == [Example("é", ("b",))]


def test_a_row_in_latin_1_among_rows_in_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    row = '{"input": "é", "output": "b"}\n'
    path.write_bytes(row.encode() + row.encode("latin-1"))
    with pytest.raises(InvalidInput, match=r"examples\.jsonl, row 2 is not UTF-8 \(byte 42 of the file\)"):
        read_tasks(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["task.json", "task.jsonl"])
def test_utf_16_is_named(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes('{"input": "a", "output": "b"}\n'.encode(encoding))
    with pytest.raises(InvalidInput, match=rf"{name} is in UTF-16 or UTF-32; convert it to UTF-8"):
        read_tasks(tmp_path)


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text('{"input": "one\u2028two\x85", "output": "b"}\r\n', encoding="utf-8", newline="")
    assert _examples(path) == [Example("one\u2028two\x85", ("b",))]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=r"cannot read .*gone\.json: No such file"):
        read_tasks(tmp_path)


def test_a_task_without_instances_is_named(write_task: WriteTask) -> None:
    folder = write_task("capital", [])
    with pytest.raises(InvalidInput, match=r"capital\.json has no instances"):
        read_tasks(folder)


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ([{"input": "a", "output": "b"}], r"bad\.json is not a JSON object"),
        ("text", r"bad\.json is not a JSON object"),
        ({"Instances": []}, r"bad\.json is not in the schema .* its Definition is no text"),
        ({"Definition": [], "Instances": []}, "its Definition is no text"),
        ({"Definition": {"a": 1}, "Instances": []}, "its Definition is no text"),
        ({"Definition": ["d"]}, "its Instances are no list"),
        ({"Definition": ["d"], "Instances": {"input": "a"}}, "its Instances are no list"),
        ({"Definition": ["d"], "Instances": [{"input": "a", "output": ["b"]}], "Source": [1]}, "its Source is neither"),
    ],
)
def test_a_document_of_another_schema_is_named(tmp_path: Path, document: object, complaint: str) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(InvalidInput, match=complaint):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("instance", "complaint"),
    [
        ("text", "is not a JSON object"),
        ({"input": "a"}, "has no output text"),
        ({"input": "a", "output": None}, "has no output text"),
        ({"input": "a", "output": []}, "has no output text"),
        ({"input": "a", "output": {"b": 1}}, "has no output text"),
        ({"input": "a", "output": ["b", None]}, "has no output text"),
        ({"input": ["a"], "output": ["b"]}, "has no input text"),
        ({"input": "\ud800", "output": ["b"]}, "holds half of a surrogate pair"),
    ],
)
def test_a_bad_instance_is_named_by_file_and_place(write_task: WriteTask, instance: object, complaint: str) -> None:
    folder = write_task("capital", [{"input": "France", "output": ["Paris"]}, instance])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=rf"capital\.json, Instances\[1\] {complaint}"):
        read_tasks(folder)


def test_a_task_that_occurs_twice_is_refused_with_both_files(write_task: WriteTask) -> None:
    folder = write_task("capital", [{"input": "France", "output": ["Paris"]}])
    _lines(folder / "more.jsonl", {"task": "capital", "input": "Spain", "output": "Madrid"})
    with pytest.raises(InvalidInput, match=r"'capital' occurs twice, in .*capital\.json and .*more\.jsonl; rename one"):
        read_tasks(folder)


def test_a_task_in_both_formats_is_refused(write_task: WriteTask) -> None:
    folder = write_task("capital", [{"input": "France", "output": ["Paris"]}])
    _lines(folder / "capital.jsonl", {"input": "Spain", "output": "Madrid"})
    with pytest.raises(InvalidInput, match=r"'capital' occurs twice, in .*capital\.json and .*capital\.jsonl"):
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
