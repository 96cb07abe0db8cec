"""What an evaluation compares, read and checked, and cut into units of work."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.adapters.inventory import Inventory
from server.backbone import Backbone, load_backbone, training_dtype
from server.errors import InvalidInput
from server.training.columns import (
    BASE,
    MEAN,
    UNNAMED,
    Column,
    read_columns,
    read_hyperparameters,
)
from server.training.evaluation_tasks import Draw, EvaluationTask, draw, read_evaluation_tasks
from server.training.methods import Hyperparameters, Method
from server.training.prompts import DEFAULT_PROMPT_FORMAT
from server.training.scores import RunSettings, Unit


@dataclass(frozen=True)
class BackboneSource:
    """Where every process loads its backbone from; the arguments of `load_backbone`."""

    name: str
    cache_dir: Path
    device: str = "cpu"

    def load(self) -> tuple[Backbone, Backbone]:
        """(the backbone that learns, the one that answers): bf16 where it is faster, and fp32 answers on a CPU."""
        dtype = training_dtype(self.device)
        training = load_backbone(self.name, self.cache_dir, self.device, dtype)
        if torch.device(self.device).type != "cpu" or dtype == torch.float32:
            return training, training
        return training, load_backbone(self.name, self.cache_dir, self.device)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, and on how much. Raises InvalidInput for what cannot be run.

    `inventories` are documents as `Inventory.to_bytes` makes them, by the name behind a column's @; the one
    named "" belongs to columns without @. `hyperparameters` maps a column, a method, or "" for all, to what is
    set for it.
    """

    data: Path
    backbone: BackboneSource
    methods: tuple[str, ...] = (BASE, MEAN, "mhr")
    inventories: Mapping[str, bytes] = field(default_factory=dict)
    tasks: tuple[str, ...] | None = None  # None: all of the folder
    num_examples: tuple[int, ...] = (24,)
    num_instances: int = 100
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int = 64
    max_context: int = 2048  # tokens of a prompt and its answer, and so the room for demonstrations
    validation_fraction: float = 0.25  # of the examples, for early stopping
    hyperparameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.num_examples or min(self.num_examples) < 2:
            raise InvalidInput("at least 2 examples are needed: one to learn from and one to validate on")
        if self.num_instances < 1 or not self.seeds:
            raise InvalidInput("at least one instance and one seed are needed")


@dataclass(frozen=True)
class Plan:
    """A configuration, read and checked: everything that a process needs but the backbone."""

    config: EvaluateConfig
    tasks: Mapping[str, EvaluationTask]
    inventories: Mapping[str, Inventory]
    columns: Mapping[str, Column]
    hyperparameters: Mapping[str, Hyperparameters]

    @classmethod
    def read(cls, config: EvaluateConfig) -> Plan:
        """Read tasks and inventories. Raises InvalidInput for whatever can be known to be wrong beforehand."""
        inventories = {name: Inventory.from_bytes(data) for name, data in config.inventories.items()}
        columns = read_columns(config.methods, inventories)
        hyperparameters = read_hyperparameters(columns, config.hyperparameters)
        tasks = {task.name: task for task in read_evaluation_tasks(config.data, config.tasks)}
        plan = cls(config, tasks, inventories, {column.name: column for column in columns}, hyperparameters)
        for task in tasks:
            plan.draws(task, config.seeds[0])
        return plan

    def units(self) -> list[Unit]:
        """All units, task by task; a method that uses no examples has one whatever their number."""
        return [
            Unit(task, seed, examples, column.name)
            for task in self.tasks
            for seed in self.config.seeds
            for column in self.columns.values()
            for examples in (self.config.num_examples if column.uses_examples else (0,))
        ]

    def draws(self, task: str, seed: int) -> dict[int, Draw]:
        """{number of examples: draw} of a task."""
        return draw(self.tasks[task], self.config.num_examples, self.config.num_instances, seed)

    def prompt_format(self, column: Column) -> str:
        """Of the column's inventory, else of the one without a name, so that all columns are prompted alike."""
        inventory = self.inventories.get(column.inventory or UNNAMED)
        return DEFAULT_PROMPT_FORMAT if inventory is None else inventory.prompt_format

    def settings(self) -> RunSettings:
        """What the scores depend on, for their folder."""
        config = self.config
        return RunSettings(
            protocol={
                "backbone": Path(config.backbone.name).name,
                "instances": config.num_instances,
                "max_new_tokens": config.max_new_tokens,
                "max_context": config.max_context,
                "validation_fraction": config.validation_fraction,
            },
            tasks={task.name: task.digest for task in self.tasks.values()},
            columns={
                f"{column.name}, {number} examples" if column.uses_examples else column.name: self._about(column)
                for column in self.columns.values()
                for number in config.num_examples
            },
        )

    def _about(self, column: Column) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if column.inventory is not None:
            about["inventory"] = hashlib.sha256(self.config.inventories[column.inventory]).hexdigest()
        if column.name in self.hyperparameters:
            method = Method(column.method)
            about["hyperparameters"] = self.hyperparameters[column.name].resolved(method).used_by(method)
        return about
