"""Labelled examples of tasks, read from Super-NaturalInstructions files or plain JSON Lines."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from server.errors import InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One input and the answers that count as right; the first one is the preferred."""

    input: str
    outputs: tuple[str, ...]
    place: str = field(default="", compare=False)  # file and row, where it was read from a file


@dataclass(frozen=True)
class TaskExamples:
    """A task's instruction and its examples, read from `file`."""

    task: str
    instruction: str
    examples: tuple[Example, ...]
    licence: str = ""
    source: str = ""
    file: Path = field(default=Path(), compare=False)


def read_tasks(folder: Path) -> list[TaskExamples]:
    """Every task in a folder: `*.json` in the schema of Super-NaturalInstructions, `*.jsonl` plain.

    A line of a plain file is {"input", "output": str or [str], "task"?, "instruction"?}; the file's
    name is the task unless a line names one. Raises InvalidInput naming file and row.
    """
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not files:
        raise InvalidInput(f"no *.json or *.jsonl task files in {folder}")
    seen: dict[str, TaskExamples] = {}
    for file in files:
        for task in _read_superni(file) if file.suffix == ".json" else _read_lines(file):
            first = seen.setdefault(task.task, task)
            if first is not task:
                raise InvalidInput(f"the task id {task.task!r} occurs twice, in {first.file} and {file}; rename one")
    return list(seen.values())


def _read_superni(file: Path) -> Iterator[TaskExamples]:
    document = _parse(_text(file), str(file))
    definition, instances = document.get("Definition"), document.get("Instances")
    if isinstance(definition, list):
        definition = definition[0] if definition else None
    if not isinstance(definition, str):
        raise _not_superni(file, "its Definition is no text")
    if not isinstance(instances, list):
        raise _not_superni(file, "its Instances are no list")
    if not instances:
        raise InvalidInput(f"{file} has no instances")
    yield TaskExamples(
        task=file.stem,
        instruction=definition,
        examples=tuple(_example(row, f"{file}, Instances[{number}]") for number, row in enumerate(instances)),
        licence=_joined(document, "Instance License", file),
        source=_joined(document, "Source", file),
        file=file,
    )


def _not_superni(file: Path, reason: str) -> InvalidInput:
    return InvalidInput(
        f"{file} is not in the schema of Super-NaturalInstructions: {reason}; plain rows belong in a *.jsonl file"
    )


def _joined(document: dict[str, Any], key: str, file: Path) -> str:
    """A text or a list of texts as one text."""
    value = document.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _not_superni(file, f"its {key} is neither a text nor a list of texts")
    return ", ".join(texts)


def _read_lines(file: Path) -> Iterator[TaskExamples]:
    grouped: dict[str, list[Example]] = {}
    instructions: dict[str, str] = {}
    for number, row in _rows(file):
        place = f"{file}, row {number}"
        task = row.get("task", file.stem)
        if not isinstance(task, str):
            raise InvalidInput(f"{place}: the task must be a text, not {task!r}")
        instruction = row.get("instruction", instructions.get(task, ""))
        if not isinstance(instruction, str):
            raise InvalidInput(f"{place}: the instruction must be a text, not {instruction!r}")
        if instructions.setdefault(task, instruction) != instruction:
            raise InvalidInput(f"{place}: task {task!r} has another instruction than in an earlier row")
        grouped.setdefault(task, []).append(_example(row, place))
    if not grouped:
        raise InvalidInput(f"{file} has no rows")
    for task, examples in grouped.items():
        yield TaskExamples(task=task, instruction=instructions[task], examples=tuple(examples), file=file)


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines: a text inside a row may hold U+2028 and its like, which end no row.
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield number, _parse(line, f"{file}, row {number}")


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput(f"{place} is not a JSON object")
    return value


def _text(file: Path) -> str:
    """A file's text, in UTF-8 with or without a byte order mark."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}") from error
    # JSON has no NUL of its own, while UTF-16 and UTF-32 write one beside every letter of English.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise InvalidInput(f"{file} is in UTF-16 or UTF-32; convert it to UTF-8 first")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(
            f"{file}, row {row} is not UTF-8 (byte {error.start} of the file); convert the file first"
        ) from error


def _example(row: Any, place: str) -> Example:
    if not isinstance(row, dict):
        raise InvalidInput(f"{place} is not a JSON object")
    text, outputs = row.get("input"), row.get("output")
    answers = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(text, str):
        raise InvalidInput(f"{place} has no input text")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InvalidInput(f"{place} has no output text")
    for part in (text, *answers):
        if not _is_unicode(part):
            raise InvalidInput(f"{place} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Example(input=text, outputs=tuple(answers), place=place)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def hold_out(examples: Sequence[T], fraction: float, order: Sequence[int]) -> tuple[list[T], list[T]]:
    """Split into (kept, held out) along a given order; at least one of each where there are two.

    Raises InvalidInput when there are fewer than two examples.
    """
    if len(examples) < 2:
        raise InvalidInput("at least two examples are needed: one to learn from and one to validate on")
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    shuffled = [examples[i] for i in order]
    return shuffled[count:], shuffled[:count]
