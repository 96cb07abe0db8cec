"""Multi-task pre-training: many tasks teach an inventory its skills, and each task its routing over them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory, InventoryTask, check_heads
from server.adapters.routing import fresh_routing
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate, encode_examples
from server.training.card import write_card
from server.training.examples import TaskExamples, hold_out, read_tasks
from server.training.learners import RoutedLearner, fresh_skills
from server.training.prompts import DEFAULT_PROMPT_FORMAT
from server.training.sampling import BatchSampler
from server.training.trainer import Trainer, TrainerConfig

CHECKPOINT = "checkpoint.safetensors"
INVENTORY = "inventory.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class PretrainConfig:
    """What to learn and how long. `num_heads` = 1 is Poly, more is MHR."""

    data: Path
    out: Path
    num_skills: int = 8
    num_heads: int = 8
    rank: int = 4
    alpha: float = 16.0
    batch_size: int = 16
    validation_fraction: float = 0.05
    checkpoint_every: int = 100
    prompt_format: str = DEFAULT_PROMPT_FORMAT
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=1000))

    def __post_init__(self) -> None:
        for name in ("num_skills", "num_heads", "rank", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1", param=name)
        if self.trainer.steps < 1:
            raise InvalidInput("steps must be at least 1", param="steps")


@dataclass(frozen=True)
class PretrainProgress:
    """One finished step: loss in nats per answer token, and seconds."""

    step: int
    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class _Data:
    """The tasks, tokenised, and a part of each kept for validation."""

    tasks: list[TaskExamples]
    train: list[EncodedExample]
    validation: list[Batch]  # one batch a task, in the tasks' order


def pretrain(
    config: PretrainConfig,
    backbone: Backbone,
    *,
    on_progress: Callable[[PretrainProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train an inventory and write it, its card and its log to `config.out`; returns the inventory's path.

    A run that was stopped goes on from its last checkpoint in `config.out`, with the same batches and
    noise as if it had not been. Returns None when `should_stop` ended it early.
    Raises InvalidInput for data, settings or a disk that cannot be used, naming them.
    """
    data = _load_data(config, backbone)
    trainer = _trainer(config, backbone, len(data.tasks))
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        _resume(config.out, trainer)
        before = _validate(trainer, data) if trainer.step_count == 0 else _logged_validation(config.out)
        _log(config.out, {"step": 0, "validation": before}) if trainer.step_count == 0 else None
        if not _run(config, trainer, data, on_progress, should_stop):
            return None
        return _write(config, backbone, trainer, data, before)
    except OSError as error:
        raise InvalidInput(f"cannot write to {config.out}: {error}; the last checkpoint there is kept") from error


def _load_data(config: PretrainConfig, backbone: Backbone) -> _Data:
    tasks = read_tasks(config.data)
    train: list[EncodedExample] = []
    validation: list[Batch] = []
    for index, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(config.trainer.seed * 1_000_003 + index)
        order = torch.randperm(len(task.examples), generator=generator).tolist()
        encoded = encode_examples(
            backbone.tokenizer,
            task.examples,
            task=index,
            instruction=task.instruction,
            prompt_format=config.prompt_format,
            context_length=backbone.context_length,
            place=task.task,
        )
        kept, held_out = hold_out(encoded, config.validation_fraction, order)
        train += kept
        validation.append(collate(held_out))
    return _Data(tasks, train, validation)


def _trainer(config: PretrainConfig, backbone: Backbone, num_tasks: int) -> Trainer:
    context = inject(backbone.model)
    sizes = linear_sizes(backbone.model)
    for linear, (d_in, d_out) in sizes.items():
        check_heads(linear, d_in, d_out, config.num_heads)
    generator = torch.Generator().manual_seed(config.trainer.seed)
    A, B = fresh_skills(sizes, config.num_heads, config.num_skills, config.rank, generator)
    start = Inventory(A, B, config.alpha, backbone.fingerprint, backbone.name, config.prompt_format)
    routing = torch.stack([fresh_routing(*start.routing_shape, generator) for _ in range(num_tasks)])
    learner = RoutedLearner(start, routing, train_skills=True).to(backbone.device)
    return Trainer(backbone.model, context, learner, config.trainer)


def _run(
    config: PretrainConfig,
    trainer: Trainer,
    data: _Data,
    on_progress: Callable[[PretrainProgress], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Step to the end; False when stopped early. Either way the state is on disk."""
    steps = config.trainer.steps
    batches = BatchSampler(data.train, config.batch_size, config.trainer.seed).from_step(trainer.step_count)
    while trainer.step_count < steps and not should_stop():
        began = time.perf_counter()
        loss = trainer.step(next(batches))
        progress = PretrainProgress(trainer.step_count, steps, loss, time.perf_counter() - began)
        _log(config.out, {"step": progress.step, "loss": round(loss, 5), "seconds": round(progress.seconds, 3)})
        on_progress(progress)
        if trainer.step_count % config.checkpoint_every == 0:
            _write_atomically(config.out / CHECKPOINT, trainer.to_bytes())
    _write_atomically(config.out / CHECKPOINT, trainer.to_bytes())
    return trainer.step_count >= steps


def _validate(trainer: Trainer, data: _Data) -> dict[str, float]:
    """Mean loss of each task's held-out part, in nats per answer token."""
    return {
        task.task: round(trainer.evaluate([batch]), 4) for task, batch in zip(data.tasks, data.validation, strict=True)
    }


def _write(config: PretrainConfig, backbone: Backbone, trainer: Trainer, data: _Data, before: dict[str, float]) -> Path:
    after = _validate(trainer, data)
    _log(config.out, {"step": trainer.step_count, "validation": after})
    learner = trainer.learner
    assert isinstance(learner, RoutedLearner)
    A, B = learner.skills()
    inventory = Inventory(
        A=A,
        B=B,
        alpha=config.alpha,
        backbone_fingerprint=backbone.fingerprint,
        backbone_name=backbone.name,
        prompt_format=config.prompt_format,
        routings={task.task: learner.routing[i].detach().cpu() for i, task in enumerate(data.tasks)},
        tasks={t.task: InventoryTask(t.instruction, t.licence, t.source) for t in data.tasks},
        training={**_settings(config), "validation_before": before, "validation_after": after},
    )
    path = config.out / INVENTORY
    _write_atomically(path, inventory.to_bytes())
    write_card(
        config.out / "card.md", inventory, [record["loss"] for record in read_log(config.out) if "loss" in record]
    )
    return path


def _settings(config: PretrainConfig) -> dict[str, Any]:
    trainer = config.trainer
    return {
        "steps": trainer.steps,
        "batch_size": config.batch_size,
        "adapter_lr": trainer.adapter_lr,
        "routing_lr": trainer.routing_lr,
        "warmup": trainer.warmup,
        "clip_norm": trainer.clip_norm,
        "noise": trainer.noise,
        "seed": trainer.seed,
        "validation_fraction": config.validation_fraction,
    }


def _resume(out: Path, trainer: Trainer) -> None:
    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        (out / LOG).unlink(missing_ok=True)
        return
    trainer.load_bytes(checkpoint.read_bytes())
    kept = [record for record in read_log(out) if record["step"] <= trainer.step_count]
    _write_atomically(out / LOG, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _logged_validation(out: Path) -> dict[str, float]:
    first: dict[str, float] = next(record["validation"] for record in read_log(out) if "validation" in record)
    return first


def read_log(out: Path) -> Sequence[dict[str, Any]]:
    """The records of a run's log: {"step", "loss", "seconds"} and {"step", "validation": {task: loss}}."""
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def _log(out: Path, record: dict[str, Any]) -> None:
    with (out / LOG).open("a") as log:
        log.write(json.dumps(record) + "\n")


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".writing")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
