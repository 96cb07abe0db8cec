"""Classification sets whose answer is one of a few choices: `labels.json`, `train.json` and `test.json` in a folder.

`labels.json` lists the choices; the parts are lists of {"sentence": str, "label": one of the choices}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import InvalidInput
from server.training.examples import Example

_CHOICES, _TRAIN, _TEST = "labels.json", "train.json", "test.json"


@dataclass(frozen=True)
class RankClassification:
    """One set. Without a part of its own to learn from, or to answer, `test` is None and `train` has all there is."""

    choices: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...] | None


def is_rank_classification(folder: Path) -> bool:
    """Whether a folder holds such a set."""
    return (folder / _CHOICES).is_file()


def read_rank_classification(folder: Path) -> RankClassification:
    """Read one set. Raises InvalidInput naming the file and row that is at fault."""
    choices = _read(folder / _CHOICES)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise InvalidInput(f"{folder / _CHOICES} must be a list of at least two choices, each a text")
    parts = [_read_part(folder / name, choices) for name in (_TRAIN, _TEST) if (folder / name).exists()]
    if not parts:
        raise InvalidInput(f"{folder} has neither {_TRAIN} nor {_TEST}; write at least one of them")
    return RankClassification(tuple(choices), parts[0], parts[1] if len(parts) == 2 else None)


def _read_part(file: Path, choices: list[str]) -> tuple[Example, ...]:
    rows = _read(file)
    if not isinstance(rows, list) or not rows:
        raise InvalidInput(f"{file} must be a list of at least one row")
    return tuple(_example(row, f"{file}, row {number}", choices) for number, row in enumerate(rows))


def _example(row: Any, place: str, choices: list[str]) -> Example:
    if not isinstance(row, dict) or not isinstance(row.get("sentence"), str):
        raise InvalidInput(f"{place} has no sentence")
    if row.get("label") not in choices:
        raise InvalidInput(f"{place} has the label {row.get('label')!r}, which is not in {_CHOICES}")
    return Example(row["sentence"], (row["label"],))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} cannot be read as JSON in UTF-8: {error}") from error
