"""What an evaluation found: tables of methods and tasks from its scores, with the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean, median, stdev
from typing import Any

from server.errors import InvalidInput
from server.training.columns import METHODS
from server.training.lead import Lead
from server.training.scores import RunSettings, Score

_METRICS = {"rouge_l": "ROUGE-L", "accuracy": "accuracy"}
_NOTHING = "–"  # noqa: RUF001  # what tables print where there is no number


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of one value per seed; None when there are none."""
        if not values:
            return None
        return cls(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.deviation is None else f"{self.mean:.1f} ± {self.deviation:.1f}"


@dataclass(frozen=True)
class MethodRow:
    """One method in a table."""

    method: str
    tasks: dict[str, Spread | None]
    overall: Spread | None  # of the means over all tasks, of those seeds that have all tasks
    exact_match: Spread | None  # the same
    trained_parameters: int | None  # per task; None where nothing is trained
    seconds: float | None  # median of the adaptations
    demonstrations: float | None  # mean number of examples in a prompt, None where there are none
    lead: Lead | None  # over the method that the table compares with


@dataclass(frozen=True)
class Table:
    """All methods at one number of examples; those that use none stand in every table."""

    examples: int
    tasks: dict[str, str]  # task: metric
    rows: tuple[MethodRow, ...]
    devices: tuple[str, ...]
    against: str | None  # the method that all others are compared with


def make_tables(scores: Sequence[Score], against: str | None = None) -> list[Table]:
    """One table for each number of examples, fewest first; whatever the order of the scores.

    `against` names a method over which each other one's lead is shown; raises InvalidInput when it has no scores.
    """
    methods = {score.method for score in scores}
    if against is not None and against not in methods:
        raise InvalidInput(
            f"there are no scores of {against!r} to compare with; there are of {', '.join(sorted(methods))}",
            param="against",
        )
    numbers = sorted({score.examples for score in scores} - {0}) or [0]
    return [_make_table(number, [s for s in scores if s.examples in (0, number)], against) for number in numbers]


def as_markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    return "\n\n".join(_table_as_markdown(table) for table in tables)


def as_document(settings: RunSettings, scores: Sequence[Score], tables: Sequence[Table]) -> dict[str, Any]:
    """Settings, the tables made of the scores, and single scores as one document for JSON."""
    return {
        "settings": asdict(settings),
        "tables": [asdict(table) for table in tables],
        "scores": [asdict(score) for score in scores],
    }


def short_names(tasks: Sequence[str]) -> dict[str, str]:
    """{task: its name up to the first underscore}, or the whole name where that would be ambiguous."""
    heads = [task.partition("_")[0] for task in tasks]
    return {task: head if heads.count(head) == 1 else task for task, head in zip(tasks, heads, strict=True)}


def _make_table(examples: int, scores: Sequence[Score], against: str | None) -> Table:
    tasks = {score.task: _METRICS[score.metric] for score in sorted(scores, key=lambda score: score.task)}
    methods = sorted({score.method for score in scores}, key=_method_order)
    others = [score for score in scores if score.method == against]
    rows = tuple(
        _make_row(method, list(tasks), [s for s in scores if s.method == method], [] if method == against else others)
        for method in methods
    )
    devices = sorted({score.device for score in scores if score.adaptation} or {score.device for score in scores})
    return Table(examples, tasks, rows, tuple(devices), against)


def _method_order(column: str) -> tuple[int, str]:
    """As METHODS lists them, then by inventory."""
    method, _, inventory = column.partition("@")
    return METHODS.index(method), inventory


def _make_row(method: str, tasks: Sequence[str], scores: Sequence[Score], others: Sequence[Score]) -> MethodRow:
    adaptations = [score.adaptation for score in scores if score.adaptation]
    shown = [score.demonstrations for score in scores]
    return MethodRow(
        method=method,
        tasks={task: Spread.of([score.score for score in scores if score.task == task]) for task in tasks},
        overall=_over_tasks(tasks, scores, lambda score: score.score),
        exact_match=_over_tasks(tasks, scores, lambda score: score.exact_match),
        trained_parameters=max((int(a["trained_parameters"]) for a in adaptations), default=None),
        seconds=median(a["seconds"] for a in adaptations) if adaptations else None,
        demonstrations=mean(shown) if any(shown) else None,
        lead=Lead.of(scores, others),
    )


def _over_tasks(tasks: Sequence[str], scores: Sequence[Score], value: Callable[[Score], float]) -> Spread | None:
    """Over seeds, of the means over tasks. A seed without all of the tasks would compare unequal things."""
    by_seed: dict[int, list[float]] = {}
    for score in scores:
        by_seed.setdefault(score.seed, []).append(value(score))
    return Spread.of([mean(values) for values in by_seed.values() if len(values) == len(tasks)])


def _table_as_markdown(table: Table) -> str:
    names = short_names(list(table.tasks))
    columns = _columns(table, names)
    lines = [
        f"{' and '.join(sorted(set(table.tasks.values())))} in percent after {table.examples} examples: "
        f"mean over seeds ± standard deviation ({', '.join(table.devices)})",
        "",
        f"| {' | '.join(heading for heading, _ in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_shown(cell(row)) for _, cell in columns)} |" for row in table.rows),
    ]
    if table.against is not None:
        lines += ["", "Ahead: mean difference over draws ± its standard error (tasks with a higher mean)."]
    longer = [f"{short} is {task}" for task, short in names.items() if short != task]
    return "\n".join([*lines, *(["", "; ".join(longer) + "."] if longer else [])])


def _columns(table: Table, names: Mapping[str, str]) -> list[tuple[str, Callable[[MethodRow], object]]]:
    """Each column's heading, and what it shows of a row."""
    metrics = set(table.tasks.values())
    heads = {task: name if len(metrics) == 1 else f"{name} ({table.tasks[task]})" for task, name in names.items()}
    ranked = metrics == {_METRICS["accuracy"]}  # where accuracy is the exact match
    return [
        ("method", _method_and_demonstrations),
        *((head, partial(_on_task, task)) for task, head in heads.items()),
        ("mean", lambda row: row.overall),
        *([] if ranked else [("exact match", lambda row: row.exact_match)]),
        *([] if table.against is None else [(f"ahead of {table.against}", lambda row: row.lead)]),
        ("tuned", lambda row: None if row.trained_parameters is None else f"{row.trained_parameters:,}"),
        ("seconds", lambda row: None if row.seconds is None else f"{row.seconds:.1f}"),
    ]


def _method_and_demonstrations(row: MethodRow) -> str:
    return row.method if row.demonstrations is None else f"{row.method} ({row.demonstrations:.1f} in the prompt)"


def _on_task(task: str, row: MethodRow) -> Spread | None:
    return row.tasks[task]


def _shown(value: object) -> str:
    return _NOTHING if value is None else str(value)
