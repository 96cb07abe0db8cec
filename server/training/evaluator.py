"""One unit of an evaluation: adapt on a few examples of a task, answer other instances of it, score the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import mean
from typing import Any

import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import BackboneMismatch
from server.training.adapt import AdaptSpec, adapt, split_examples
from server.training.answering import Answerer
from server.training.columns import DEMONSTRATIONS, MEAN, Column
from server.training.demonstrations import fit_demonstrations, order_demonstrations
from server.training.evaluation_plan import Plan
from server.training.evaluation_tasks import Draw, EvaluationTask
from server.training.examples import Example
from server.training.methods import Method
from server.training.prompts import encode_answer, find_prompt_format
from server.training.rouge import exact_match, rouge_l
from server.training.scores import Score, Unit

Prompt = tuple[int, ...]


class Evaluator:
    """Does units, with a backbone of its own. Raises BackboneMismatch when an inventory is of another one."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._training, serving = plan.config.backbone.load()
        for name, inventory in plan.inventories.items():
            _check_fingerprint(name, inventory, serving)
        self._answerer = Answerer(serving, plan.config.max_new_tokens)
        self._tokenizer = serving.tokenizer
        self._context = min(plan.config.max_context, serving.context_length)

    def score(self, unit: Unit) -> Score:
        """Learn what there is to learn, answer the instances, score the answers."""
        task, column = self._plan.tasks[unit.task], self._plan.columns[unit.method]
        drawn = self._plan.draws(unit.task, unit.seed)[unit.examples]
        adapter, adaptation = self._adapter(column, task, drawn.examples, unit.seed)
        prompts, demonstrations = self._prompts(column, task, drawn, unit.seed)
        if task.choices:
            answers = self._answerer.rank(prompts, task.choices, adapter)
        else:
            end_mark = find_prompt_format(self._plan.prompt_format(column)).next_pair
            answers = self._answerer.generate(prompts, adapter, end_mark)
        pairs = [(answer, instance.outputs) for answer, instance in zip(answers, drawn.instances, strict=True)]
        matches = _percent([exact_match(answer, outputs) for answer, outputs in pairs])
        return Score(
            task=unit.task,
            method=unit.method,
            seed=unit.seed,
            examples=unit.examples,
            metric="accuracy" if task.choices else "rouge_l",
            score=matches if task.choices else _percent([rouge_l(answer, outputs) for answer, outputs in pairs]),
            exact_match=matches,
            instances=len(pairs),
            demonstrations=demonstrations,
            adaptation=adaptation,
            device=self._device,
        )

    @cached_property
    def _device(self) -> str:
        device = self._training.device
        return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type

    def _adapter(
        self, column: Column, task: EvaluationTask, examples: Sequence[Example], seed: int
    ) -> tuple[Adapter | None, Mapping[str, Any]]:
        """The adapter that a column answers with, and what its adaptation reported."""
        inventory = None if column.inventory is None else self._plan.inventories[column.inventory]
        if column.method == MEAN:
            assert inventory is not None
            return mean_adapter(inventory), {}
        if not column.learns:
            return None, {}
        spec = self._spec(column, task, examples, seed)
        result = adapt(spec, self._training, inventory, None, _Alone())
        if result.adapter is not None:
            return result.adapter, result.metrics
        assert inventory is not None
        assert result.routing is not None
        return assemble(inventory, result.routing), result.metrics

    def _spec(self, column: Column, task: EvaluationTask, examples: Sequence[Example], seed: int) -> AdaptSpec:
        """The adaptation; its held-out part comes out of the examples, so no instance chooses the checkpoint."""
        train, validation = split_examples(examples, None, self._plan.config.validation_fraction, seed)
        return AdaptSpec(
            method=Method(column.method),
            instruction=task.instruction,
            examples=train,
            validation=validation,
            prompt_format=self._plan.prompt_format(column),
            hyperparameters=self._plan.hyperparameters[column.name],
            seed=seed,
        )

    def _prompts(self, column: Column, task: EvaluationTask, drawn: Draw, seed: int) -> tuple[list[Prompt], float]:
        """The instances' prompts, and the mean number of demonstrations in them."""
        shown = order_demonstrations(drawn.examples, seed) if column.method == DEMONSTRATIONS else []
        room = self._context - self._answer_tokens(task)
        fitted = [
            fit_demonstrations(
                self._tokenizer, self._plan.prompt_format(column), task.instruction, instance.input, shown, room
            )
            for instance in drawn.instances
        ]
        return [tuple(tokens) for tokens, _ in fitted], round(mean(float(count) for _, count in fitted), 2)

    def _answer_tokens(self, task: EvaluationTask) -> int:
        if not task.choices:
            return self._plan.config.max_new_tokens
        return max(len(encode_answer(self._tokenizer, choice)) for choice in task.choices)


class _Alone:
    """The context of an adaptation that nobody watches."""

    def should_stop(self) -> bool:
        return False

    def report(self, event: str, data: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint: bytes) -> None:
        pass


def _check_fingerprint(name: str, inventory: Inventory, backbone: Backbone) -> None:
    if inventory.backbone_fingerprint != backbone.fingerprint:
        raise BackboneMismatch(
            f"the inventory {name!r} belongs to the backbone {inventory.backbone_name} with the fingerprint "
            f"{inventory.backbone_fingerprint[:12]}; this one, {backbone.name}, has {backbone.fingerprint[:12]}. "
            "Choose the inventory's own with MHR_BACKBONE"
        )


def _percent(values: Sequence[float]) -> float:
    """The mean of numbers between 0 and 1, as a percentage."""
    return round(100.0 * mean(values), 2)
