"""Labelled examples of tasks, read from Super-NaturalInstructions files or plain JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from server.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One input and the answers that count as right; the first one is the preferred."""

    input: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class TaskExamples:
    """A task's instruction and its examples."""

    task: str
    instruction: str
    examples: tuple[Example, ...]
    licence: str = ""
    source: str = ""


def read_tasks(folder: Path) -> list[TaskExamples]:
    """Every task in a folder: `*.json` in the schema of Super-NaturalInstructions, `*.jsonl` plain.

    A line of a plain file is {"input", "output": str or [str], "task"?, "instruction"?}; the file's
    name is the task unless a line names one. Raises InvalidInput naming file and row.
    """
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not files:
        raise InvalidInput(f"no *.json or *.jsonl task files in {folder}")
    tasks = [task for file in files for task in (_read_superni(file) if file.suffix == ".json" else _read_lines(file))]
    seen: dict[str, TaskExamples] = {}
    for task in tasks:
        if task.task in seen:
            raise InvalidInput(f"the task id {task.task!r} occurs twice in {folder}; rename one of its files")
        seen[task.task] = task
    return tasks


def read_examples(file: Path) -> list[Example]:
    """The examples of one JSON Lines file. Raises InvalidInput naming the row."""
    return [_example(row, f"{file}, row {number}") for number, row in _rows(file)]


def _read_superni(file: Path) -> Iterator[TaskExamples]:
    try:
        document = json.loads(_text(file))
        definition = document["Definition"]
        instances = document["Instances"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{file} is not in the schema of Super-NaturalInstructions: {error}") from error
    if not instances:
        raise InvalidInput(f"{file} has no instances")
    yield TaskExamples(
        task=file.stem,
        instruction=definition[0] if isinstance(definition, list) else definition,
        examples=tuple(_example(row, f"{file}, instance {number}") for number, row in enumerate(instances)),
        licence=", ".join(document.get("Instance License", [])),
        source=", ".join(document.get("Source", [])),
    )


def _read_lines(file: Path) -> Iterator[TaskExamples]:
    grouped: dict[str, list[Example]] = {}
    instructions: dict[str, str] = {}
    for number, row in _rows(file):
        place = f"{file}, row {number}"
        task = row.get("task", file.stem)
        instruction = row.get("instruction", instructions.get(task, ""))
        if instructions.setdefault(task, instruction) != instruction:
            raise InvalidInput(f"{place}: task {task!r} has another instruction than in an earlier row")
        grouped.setdefault(task, []).append(_example(row, place))
    if not grouped:
        raise InvalidInput(f"{file} has no rows")
    for task, examples in grouped.items():
        yield TaskExamples(task=task, instruction=instructions[task], examples=tuple(examples))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{file}, row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{file}, row {number} is not a JSON object")
        yield number, row


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file} is not UTF-8 (byte {error.start}); convert it first") from error


def _example(row: dict[str, Any], place: str) -> Example:
    text = row.get("input")
    outputs = row.get("output")
    answers: Iterable[Any] = [outputs] if isinstance(outputs, str) else outputs or []
    answers = tuple(answers)
    if not isinstance(text, str):
        raise InvalidInput(f"{place} has no input text")
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise InvalidInput(f"{place} has no output text")
    return Example(input=text, outputs=answers)


def hold_out(examples: Sequence[T], fraction: float, order: Sequence[int]) -> tuple[list[T], list[T]]:
    """Split into (kept, held out) along a given order; at least one of each where there are two.

    Raises InvalidInput when there are fewer than two examples.
    """
    if len(examples) < 2:
        raise InvalidInput("at least two examples are needed: one to learn from and one to validate on")
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    shuffled = [examples[i] for i in order]
    return shuffled[count:], shuffled[:count]
