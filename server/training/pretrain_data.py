"""The tasks of a pre-training run: read, checked, tokenised and split; and a digest that tells them apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters_store.errors import InvalidValue
from adapters_store.values import check_task_id
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate, encode_examples
from server.training.examples import TaskExamples, hold_out, read_tasks
from server.training.pretrain_config import PretrainConfig


@dataclass(frozen=True)
class PretrainData:
    """The tasks, tokenised, and a part of each kept for validation."""

    tasks: list[TaskExamples]
    train: list[EncodedExample]
    validation: list[Batch]  # one batch a task, in the tasks' order

    def digests(self) -> dict[str, str]:
        """What each task says, as a short digest, by which a resumed run knows its data again."""
        return {task.task: _digest(task) for task in self.tasks}


def load_data(config: PretrainConfig, backbone: Backbone) -> PretrainData:
    """Read the folder of tasks and hold a seeded part of each out.

    Raises InvalidInput naming file and row of what cannot be used.
    """
    tasks = read_tasks(config.data)
    train: list[EncodedExample] = []
    validation: list[Batch] = []
    for index, task in enumerate(tasks):
        _check(task)
        encoded = encode_examples(
            backbone.tokenizer,
            task.examples,
            task=index,
            instruction=task.instruction,
            prompt_format=config.prompt_format,
            context_length=backbone.context_length,
            place=task.task,
        )
        generator = torch.Generator().manual_seed(config.trainer.seed * 1_000_003 + index)
        order = torch.randperm(len(encoded), generator=generator).tolist()
        kept, held_out = hold_out(encoded, config.validation_fraction, order)
        train += kept
        validation.append(collate(held_out))
    return PretrainData(tasks, train, validation)


def describe_changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which tasks came, went or changed, in words; empty when none did."""
    changes = {
        "new": sorted(now.keys() - before.keys()),
        "missing": sorted(before.keys() - now.keys()),
        "changed": sorted(task for task in before.keys() & now.keys() if before[task] != now[task]),
    }
    return "; ".join(f"{what}: {_listed(tasks)}" for what, tasks in changes.items() if tasks)


def _check(task: TaskExamples) -> None:
    try:
        check_task_id(task.task)  # as importing the inventory will
    except InvalidValue as error:
        raise InvalidInput(f"{task.file}: {error}") from error
    if len(task.examples) < 2:
        raise InvalidInput(
            f"{task.file}: the task {task.task!r} has one example; "
            "two are needed, one to learn from and one to hold out"
        )


def _digest(task: TaskExamples) -> str:
    content = [task.instruction, [[example.input, example.outputs] for example in task.examples]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _listed(tasks: list[str]) -> str:
    return ", ".join(tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
