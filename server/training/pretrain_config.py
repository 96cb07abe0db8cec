"""What a pre-training run learns, from what, and how: the methods and every setting of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from server.errors import InvalidInput
from server.training.prompts import DEFAULT_PROMPT_FORMAT
from server.training.sampling import SamplingConfig, TaskSampling
from server.training.trainer import TrainerConfig

_HEADS = 8
_SKILLS = 8
_SPREAD = 8.0


class PretrainMethod(StrEnum):
    """Which inventory is learnt (docs/notation.md)."""

    MHR = "mhr"  # K skills, h > 1 heads, each task a learnt routing
    POLY = "poly"  # the same with one head
    SHARED = "shared"  # one LoRA that all tasks share
    PRIVATE = "private"  # one LoRA a task, whose mean is AdapterSoup


@dataclass(frozen=True)
class Layout:
    """A method with its sizes: h heads, and K skills or None for as many as there are tasks.

    Learnt skills are moved `spread` times as far from their mean (docs/pretraining.md); None where routing is fixed.
    """

    method: PretrainMethod
    num_heads: int
    num_skills: int | None
    spread: float | None

    @property
    def learns_routing(self) -> bool:
        """Whether a task's routing is learnt; else it is fixed, to the one skill or to the task's own."""
        return self.method in (PretrainMethod.MHR, PretrainMethod.POLY)

    def skills_for(self, num_tasks: int) -> int:
        """K, for so many tasks."""
        return num_tasks if self.num_skills is None else self.num_skills


def choose_layout(
    method: PretrainMethod | None = None,
    num_heads: int | None = None,
    num_skills: int | None = None,
    spread: float | None = None,
) -> Layout:
    """The layout of what was asked for; what is left out takes the method's own value.

    Without a method one head is `poly` and anything else `mhr`. Raises InvalidInput for sizes that
    contradict the method.
    """
    for name, number in (("heads", num_heads), ("skills", num_skills)):
        if number is not None and number < 1:
            raise InvalidInput(f"{name} must be at least 1", param=name)
    if spread is not None and not 1 <= spread < math.inf:
        raise InvalidInput("spread must be a number of at least 1", param="spread")
    if method is None:
        method = PretrainMethod.POLY if num_heads == 1 else PretrainMethod.MHR
    if method is PretrainMethod.MHR:
        if num_heads == 1:
            raise InvalidInput("the method mhr needs more than one head; use poly, or more heads", param="heads")
        return Layout(method, num_heads or _HEADS, num_skills or _SKILLS, spread or _SPREAD)
    if num_heads not in (None, 1):
        raise InvalidInput(f"the method {method} has one head, not {num_heads}; leave heads out", param="heads")
    if method is PretrainMethod.POLY:
        return Layout(method, 1, num_skills or _SKILLS, spread or _SPREAD)
    if spread is not None:
        raise InvalidInput(f"the method {method} learns no routing; leave spread out", param="spread")
    if method is PretrainMethod.SHARED:
        if num_skills not in (None, 1):
            raise InvalidInput(
                f"the method shared has one skill, not {num_skills}; give it a larger rank instead", param="skills"
            )
        return Layout(method, 1, 1, None)
    if num_skills is not None:
        raise InvalidInput("the method private has one skill for every task; leave skills out", param="skills")
    return Layout(method, 1, None, None)


@dataclass(frozen=True)
class PretrainConfig:
    """One run. A step holds `batch_size` times `accumulate` sequences, `batch_size` of them computed at once."""

    data: Path
    out: Path
    layout: Layout = field(default_factory=choose_layout)
    rank: int = 4
    alpha: float = 16.0
    batch_size: int = 16
    accumulate: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation_fraction: float = 0.05
    checkpoint_every: int = 100
    alignment_every: int = 0  # steps between measurements of gradient alignment; 0 for none
    alignment_tasks: int = 8
    prompt_format: str = DEFAULT_PROMPT_FORMAT
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=1000))

    def __post_init__(self) -> None:
        for name in ("rank", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} must be at least 1", param=name)
        if self.trainer.steps < 1:
            raise InvalidInput("steps must be at least 1", param="steps")
        rows = self.sampling.rows_per_task
        if self.batch_size % rows:
            raise InvalidInput(
                f"a batch of {self.batch_size} sequences cannot be made of {rows} rows a task; "
                "choose a batch size that the rows divide",
                param="rows_per_task",
            )
        if self.alignment_every < 0:
            raise InvalidInput("alignment_every must be at least 0", param="alignment_every")
        if self.alignment_tasks < 2:
            raise InvalidInput("alignment_tasks must be at least 2", param="alignment_tasks")

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulate

    def settings(self) -> dict[str, Any]:
        """All that decides what is learnt, by the names of the options: a run is resumed under the same."""
        trainer, sampling = self.trainer, self.sampling
        return {
            "method": self.layout.method.value,
            "skills": self.layout.num_skills,
            "heads": self.layout.num_heads,
            "spread": self.layout.spread,
            "rank": self.rank,
            "alpha": self.alpha,
            "steps": trainer.steps,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "optimizer": trainer.optimizer.value,
            "adapter_lr": trainer.adapter_lr,
            "routing_lr": trainer.routing_lr,
            "warmup": trainer.warmup,
            "weight_decay": trainer.weight_decay,
            "clip_norm": trainer.clip_norm,
            "noise": trainer.noise,
            "task_sampling": sampling.tasks.value,
            "temperature": sampling.temperature if sampling.tasks is TaskSampling.TEMPERATURE else None,
            "rows_per_task": sampling.rows_per_task,
            "seed": trainer.seed,
            "validation_fraction": self.validation_fraction,
            "prompt_format": self.prompt_format,
        }
