"""Tasks to evaluate on, and the draw of examples to learn from and instances to answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from server.errors import InvalidInput
from server.training.examples import Example, read_tasks
from server.training.rank_classification import is_rank_classification, read_rank_classification


@dataclass(frozen=True)
class EvaluationTask:
    """One task. `test` is a part of its own to answer, None where instances come out of `examples` too.

    With `choices` every instance is answered by ranking them; without, by generating.
    """

    name: str
    instruction: str
    examples: tuple[Example, ...]
    test: tuple[Example, ...] | None = None
    choices: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 over all that is drawn from."""
        rows = [[[e.input, e.outputs] for e in part] for part in (self.examples, self.test or ())]
        content = json.dumps([self.instruction, self.choices, *rows], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Draw:
    """What one seed gives of a task: no example is among the instances."""

    examples: tuple[Example, ...]
    instances: tuple[Example, ...]


def read_evaluation_tasks(folder: Path, wanted: Collection[str] | None = None) -> list[EvaluationTask]:
    """The tasks of a folder, by its format: one or many rank-classification sets, or files as in pre-training.

    Raises InvalidInput for a folder without tasks, a file that cannot be read, and a wanted name that is not there.
    """
    sets = [child for child in sorted(folder.iterdir()) if is_rank_classification(child)]
    if is_rank_classification(folder):
        sets = [folder]
    tasks = [_ranking(child) for child in sets] if sets else _generating(folder)
    if wanted is None:
        return tasks
    missing = set(wanted) - {task.name for task in tasks}
    if missing:
        known = ", ".join(task.name for task in tasks)
        raise InvalidInput(f"no task {', '.join(sorted(missing))} in {folder}; it has {known}", param="tasks")
    return [task for task in tasks if task.name in wanted]


def draw(task: EvaluationTask, num_examples: Sequence[int], num_instances: int, seed: int) -> dict[int, Draw]:
    """{number of examples: draw}. All numbers share the instances, and fewer examples are the first of more.

    A rank-classification set may have fewer instances; it is then answered whole. Raises InvalidInput when the
    task has too few.
    """
    most = max(num_examples, default=0)
    drawn = _shuffled(task.examples, seed)
    if task.test is not None:
        tested = {instance.input for instance in task.test}
        instances = _shuffled(task.test, seed)[:num_instances]
        pool = [example for example in drawn if example.input not in tested]
    else:
        count = min(num_instances, len(drawn) - most) if task.choices else num_instances
        instances, pool = drawn[: max(count, 0)], drawn[max(count, 0) :]
    if not instances or len(pool) < most or (not task.choices and len(instances) < num_instances):
        raise InvalidInput(
            f"the task {task.name!r} has {len(drawn)} instances; {most} examples and {num_instances} others to answer "
            "are needed"
        )
    return {number: Draw(tuple(pool[:number]), tuple(instances)) for number in (0, *num_examples)}


def _ranking(folder: Path) -> EvaluationTask:
    found = read_rank_classification(folder)
    return EvaluationTask(folder.name, "", found.train, found.test, found.choices)


def _generating(folder: Path) -> list[EvaluationTask]:
    return [EvaluationTask(task.task, task.instruction, task.examples) for task in read_tasks(folder)]


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """In a seeded order, each input once, so that no example can recur among the instances."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    distinct: dict[str, Example] = {}
    for i in order:
        distinct.setdefault(examples[i].input, examples[i])
    return list(distinct.values())
