"""The record of one evaluated method, and the folder that keeps such records while a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, NamedTuple

from server.errors import Conflict, InvalidInput

_SETTINGS, _SCORES = "settings.json", "scores.jsonl"

Metric = Literal["rouge_l", "accuracy"]


class Unit(NamedTuple):
    """One piece of work: a method on one draw of a task. `examples` is 0 where the method uses none."""

    task: str
    seed: int
    examples: int
    method: str


@dataclass(frozen=True)
class Score:
    """What a method scored on one draw of a task; scores are 0 to 100."""

    task: str
    method: str
    seed: int
    examples: int  # that the method was given, its own held-out part included
    metric: Metric
    score: float  # mean over the instances, of that metric
    exact_match: float
    instances: int
    demonstrations: float  # mean number of examples in a prompt
    adaptation: Mapping[str, Any]  # what the adaptation reported; empty where nothing was learnt
    device: str

    @property
    def unit(self) -> Unit:
        return Unit(self.task, self.seed, self.examples, self.method)


@dataclass(frozen=True)
class RunSettings:
    """What must agree between scores that stand in one table.

    `protocol` holds for all of them; `tasks` and `columns` grow, but a name never changes its meaning.
    """

    protocol: Mapping[str, Any]
    tasks: Mapping[str, Any]
    columns: Mapping[str, Any]

    def joined(self, other: RunSettings, place: str) -> RunSettings:
        """Both together. Raises InvalidInput, naming the setting, when they disagree."""
        for part in ("protocol", "tasks", "columns"):
            mine, theirs = getattr(self, part), getattr(other, part)
            for name in mine.keys() & theirs.keys():
                if mine[name] != theirs[name]:
                    difference = _difference(theirs[name], mine[name])
                    raise InvalidInput(
                        f"{place} was made with other settings: {part}, {name}: {difference}. "
                        "Use the same settings, or another folder"
                    )
        if self.protocol.keys() != other.protocol.keys():
            raise InvalidInput(f"{place} was made by another version of this program; use another folder")
        return RunSettings(self.protocol, {**self.tasks, **other.tasks}, {**self.columns, **other.columns})


class ScoreLog:
    """The folder of a run: `settings.json`, and `scores.jsonl` with one line per finished unit."""

    def __init__(self, scores: Mapping[Unit, Score], file: TextIOWrapper) -> None:
        self.scores = dict(scores)
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, folder: Path, settings: RunSettings) -> Iterator[ScoreLog]:
        """The folder's log, made or continued, for this process alone.

        Raises Conflict when another process writes it, InvalidInput when it holds a run with other settings
        or cannot be written.
        """
        file = _open(folder)
        try:
            _lock(file, folder)
            if (folder / _SETTINGS).exists():
                settings = settings.joined(_read_settings(folder), str(folder))
            _write_settings(folder, settings)
            _cut_torn_line(folder / _SCORES)
            yield cls(_read_lines(folder / _SCORES), file)
        finally:
            file.close()

    def append(self, score: Score) -> None:
        """Keep one more score, durably. Raises InvalidInput when it cannot be written."""
        try:
            self._file.write(json.dumps(asdict(score), ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidInput(f"a score cannot be written: {error}; make room and run the command again") from error
        self.scores[score.unit] = score


def read_scores(folders: list[Path]) -> tuple[RunSettings, list[Score]]:
    """The runs of several folders as one; of a unit in two of them the first stands.

    Raises InvalidInput for a folder without scores, and when their settings disagree.
    """
    settings: RunSettings | None = None
    scores: dict[Unit, Score] = {}
    for folder in folders:
        if not (folder / _SCORES).is_file() or not (folder / _SETTINGS).is_file():
            raise InvalidInput(f"{folder} holds no scores; name a folder that `mhr evaluate --out` wrote")
        found = _read_settings(folder)
        settings = found if settings is None else settings.joined(found, str(folder))
        scores = _read_lines(folder / _SCORES) | scores
    if settings is None or not scores:
        raise InvalidInput("there are no scores yet; let `mhr evaluate` finish at least one method of one task")
    return settings, list(scores.values())


def _difference(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        return "; ".join(f"{key} {theirs.get(key)!r}, now {mine.get(key)!r}" for key in keys)
    return f"{theirs!r}, now {mine!r}"


def _open(folder: Path) -> TextIOWrapper:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / _SCORES).open("a", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"the scores cannot be written to {folder}: {error}") from error


def _lock(file: TextIOWrapper, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Conflict(f"another process writes its scores to {folder}; wait for it, or use another folder") from None


def _read_settings(folder: Path) -> RunSettings:
    try:
        return RunSettings(**json.loads((folder / _SETTINGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{folder / _SETTINGS} is damaged: {error}; use another folder") from error


def _write_settings(folder: Path, settings: RunSettings) -> None:
    temporary = folder / f".{_SETTINGS}.new"
    temporary.write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / _SETTINGS)


def _cut_torn_line(file: Path) -> None:
    """Remove a last line that a killed process did not finish."""
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


def _read_lines(file: Path) -> dict[Unit, Score]:
    scores: dict[Unit, Score] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            score = Score(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"{file}, row {number} is no score: {error}; remove the line to go on") from error
        scores.setdefault(score.unit, score)
    return scores
