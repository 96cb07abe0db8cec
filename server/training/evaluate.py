"""Methods compared on held-out tasks: adapt on a few examples, answer others, score the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, SamplingParams, TokenOutput
from server.engine.runner import Runner
from server.errors import InvalidInput
from server.training.adapt import AdaptSpec, Hyperparameters, Method, adapt, split_examples
from server.training.examples import Example, TaskExamples, read_tasks
from server.training.prompts import DEFAULT_PROMPT_FORMAT, encode_prompt, render_prompt
from server.training.rouge import rouge_l

BASE, MEAN = "base", "mu"
METHODS = (BASE, MEAN, *(method.value for method in Method))


@dataclass(frozen=True)
class EvaluateConfig:
    """What to compare, and on how much. Examples and instances are drawn by seed and never overlap."""

    data: Path
    methods: tuple[str, ...] = (BASE, MEAN, "mhr")
    num_examples: int = 24
    num_instances: int = 100
    max_new_tokens: int = 64
    seeds: tuple[int, ...] = (0,)
    validation_fraction: float = 0.25  # of the examples, for early stopping
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise InvalidInput(f"unknown methods {unknown}; choose among {', '.join(METHODS)}", param="methods")
        if self.num_examples < 2:
            raise InvalidInput("at least 2 examples are needed", param="num_examples")


@dataclass(frozen=True)
class Score:
    """One method on one task with one seed: mean ROUGE-L and exact match, 0 to 100."""

    task: str
    method: str
    seed: int
    rouge_l: float
    exact_match: float
    instances: int
    metrics: dict[str, Any]  # of the adaptation; empty where nothing was learnt


def evaluate(
    config: EvaluateConfig,
    training: Backbone,
    serving: Backbone,
    inventory: Inventory | None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Scores of every task, seed and method, in that order. The scored instances are seen by no adaptation.

    `training` is the backbone that learns (bf16 where it is faster), `serving` the one that answers.
    Raises InvalidInput when a task has too few instances or a method does not fit the inventory.
    """
    answerer = _Answerer(serving, config.max_new_tokens)
    prompt_format = inventory.prompt_format if inventory else DEFAULT_PROMPT_FORMAT
    scores: list[Score] = []
    for task in read_tasks(config.data):
        for seed in config.seeds:
            examples, instances = _draw(task, config, seed)
            for method in config.methods:
                spec = _spec(config, task, examples, prompt_format, method, seed)
                adapter, metrics = _learn(method, spec, training, inventory)
                prompts = [render_prompt(prompt_format, task.instruction, instance.input) for instance in instances]
                answers = answerer.answer(prompts, adapter, key=f"{task.task}/{seed}/{method}")
                score = _score(task.task, method, seed, answers, instances, metrics)
                scores.append(score)
                on_score(score)
    return scores


def table(scores: Sequence[Score]) -> str:
    """Markdown: a row per task with the mean ROUGE-L over seeds of each method, and the mean of all."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    methods = list(dict.fromkeys(score.method for score in scores))

    def cell(method: str, within: Sequence[str]) -> str:
        return f"{mean(s.rouge_l for s in scores if s.method == method and s.task in within):.1f}"

    head = [f"| task | {' | '.join(methods)} |", f"|---|{'---|' * len(methods)}"]
    rows = [f"| {task} | {' | '.join(cell(method, [task]) for method in methods)} |" for task in tasks]
    return "\n".join([*head, *rows, f"| mean | {' | '.join(cell(method, tasks) for method in methods)} |"])


def as_document(config: EvaluateConfig, scores: Sequence[Score]) -> dict[str, Any]:
    """Everything of a run as one document for JSON."""
    settings = asdict(config) | {"data": config.data.name, "hyperparameters": config.hyperparameters.model_dump()}
    return {"config": settings, "scores": [asdict(score) for score in scores]}


class _Answerer:
    """Greedy answers to many prompts through the engine, all under one adapter."""

    def __init__(self, backbone: Backbone, max_new_tokens: int) -> None:
        self._tokenizer = backbone.tokenizer
        self._eos = backbone.eos_token_ids
        self._max_new_tokens = max_new_tokens
        config = EngineConfig(max_context=min(backbone.context_length, 2048), max_queue=1_000_000)
        self._engine = Engine(Runner(backbone.model, inject(backbone.model), config), config, self._eos)

    def answer(self, prompts: Sequence[str], adapter: Adapter | None, key: str) -> list[str]:
        handle = None if adapter is None else AdapterHandle(key, adapter)
        sampling = SamplingParams(max_new_tokens=self._max_new_tokens)
        for number, prompt in enumerate(prompts):
            tokens = tuple(encode_prompt(self._tokenizer, prompt))
            self._engine.add(EngineRequest(str(number), key, tokens, sampling, handle))
        generated: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        while self._engine.has_work:
            for event in self._engine.step()[0]:
                if isinstance(event, TokenOutput):
                    generated[event.request_id].append(event.token_id)
                elif event.error is not None:
                    raise event.error
        return [self._text(tokens) for tokens in generated.values()]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([token for token in tokens if token not in self._eos])).strip()


class _Alone:
    """The context of an adaptation that nobody watches."""

    def should_stop(self) -> bool:
        return False

    def report(self, event: str, data: dict[str, Any]) -> None:
        pass

    def save(self, checkpoint: bytes) -> None:
        pass


def _draw(task: TaskExamples, config: EvaluateConfig, seed: int) -> tuple[list[Example], list[Example]]:
    needed = config.num_examples + config.num_instances
    if len(task.examples) < needed:
        raise InvalidInput(f"the task {task.task!r} has {len(task.examples)} instances; {needed} are needed")
    order = torch.randperm(len(task.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [task.examples[i] for i in order[:needed]]
    return drawn[: config.num_examples], drawn[config.num_examples :]


def _spec(
    config: EvaluateConfig, task: TaskExamples, examples: list[Example], prompt_format: str, method: str, seed: int
) -> AdaptSpec | None:
    if method in (BASE, MEAN):
        return None
    train, validation = split_examples(examples, None, config.validation_fraction, seed)
    return AdaptSpec(
        method=Method(method),
        instruction=task.instruction,
        examples=train,
        validation=validation,
        prompt_format=prompt_format,
        hyperparameters=config.hyperparameters,
        seed=seed,
    )


def _learn(
    method: str, spec: AdaptSpec | None, training: Backbone, inventory: Inventory | None
) -> tuple[Adapter | None, dict[str, Any]]:
    if method == BASE:
        return None, {}
    if method == MEAN:
        return mean_adapter(_needed(inventory)), {}
    assert spec is not None
    if spec.method.needs_inventory:
        spec.method.check_heads("the inventory", _needed(inventory).num_heads)
    result = adapt(spec, training, inventory, None, _Alone())
    if result.adapter is not None:
        return result.adapter, result.metrics
    assert result.routing is not None
    return assemble(_needed(inventory), result.routing), result.metrics


def _needed(inventory: Inventory | None) -> Inventory:
    if inventory is None:
        raise InvalidInput("this method needs an inventory; name one with --inventory")
    return inventory


def _score(
    task: str, method: str, seed: int, answers: Sequence[str], instances: Sequence[Example], metrics: dict[str, Any]
) -> Score:
    pairs = list(zip(answers, instances, strict=True))
    return Score(
        task=task,
        method=method,
        seed=seed,
        rouge_l=round(100 * mean(rouge_l(answer, instance.outputs) for answer, instance in pairs), 2),
        exact_match=round(100 * mean(_matches(answer, instance.outputs) for answer, instance in pairs), 2),
        instances=len(pairs),
        metrics=metrics,
    )


def _matches(answer: str, references: Sequence[str]) -> bool:
    return _plain(answer) in {_plain(reference) for reference in references}


def _plain(text: str) -> str:
    """Lower case, without punctuation, one space between words."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())
