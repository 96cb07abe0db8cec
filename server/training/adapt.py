"""Few-shot adaptation: a new task learnt from a handful of examples, by any method of the paper."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from server.adapters.assembly import Adapter
from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate, encode_examples
from server.training.examples import Example, hold_out
from server.training.learners import (
    FixedLearner,
    Learner,
    PlainLearner,
    RoutedLearner,
    fresh_adapter,
    mean_learner,
    routing_learner,
)
from server.training.rest import Rest
from server.training.sampling import BatchSampler
from server.training.trainer import Trainer, TrainerConfig
from server.training.validation import Validation, chance

_VALIDATION_BATCH = 16


class Method(StrEnum):
    """What is learnt of a new task (the table of variants in docs/notation.md)."""

    MHR = "mhr"
    MHR_Z = "mhr-z"
    MHR_MU = "mhr-mu"
    POLY = "poly"
    POLY_Z = "poly-z"
    POLY_MU = "poly-mu"
    LORA = "lora"

    @property
    def needs_inventory(self) -> bool:
        return self is not Method.LORA

    @property
    def routing_alone(self) -> bool:
        return self in (Method.MHR_Z, Method.POLY_Z)

    @property
    def learns_routing(self) -> bool:
        return self.routing_alone or self in (Method.MHR, Method.POLY)

    def check_heads(self, inventory: str, num_heads: int) -> None:
        """Raise InvalidInput when the method is for another number of heads than the inventory's."""
        if self.value.startswith("poly") and num_heads > 1:
            other = self.value.replace("poly", "mhr")
            raise InvalidInput(
                f"{self.value!r} needs an inventory with h = 1, and {inventory!r} has h = {num_heads}; use {other!r}",
                param="method",
            )
        if self.value.startswith("mhr") and num_heads == 1:
            other = self.value.replace("mhr", "poly")
            raise InvalidInput(
                f"{self.value!r} needs an inventory with h > 1, and {inventory!r} has h = 1; use {other!r}",
                param="method",
            )


# Learning rates; docs/results.md has the comparisons. A fresh LoRA begins with B = 0 and small numbers in A. Where both
# are trained, steps of one size change what they compute several times as much.
_LORA_LR = 3e-3
_TRAINED_LR = 1e-3
# Where a step shows all examples, each is shown so often that half the rate learns it too, and keeps more of the start.
_TRAINED_LR_OF_FEW = 5e-4
# Routing that is all there is to learn has far to go; beside skills that learn it loses what it began with.
_ROUTING_ALONE_LR = 0.15
_ROUTING_LR = 0.003


class Hyperparameters(BaseModel):
    """How a task is learnt; what is left out takes the method's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=60, ge=1, le=10_000, description="most steps; early stopping may end sooner")
    batch_size: int = Field(default=8, ge=1, le=256, description="examples a step")
    adapter_lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description=(
            "peak learning rate of skills and adapters; 0.003 for a `lora`, 0.001 for what begins trained, "
            "or 0.0005 where a step shows all examples"
        ),
    )
    routing_lr: float | None = Field(
        default=None,
        gt=0,
        le=10,
        description="peak learning rate of routing logits; 0.15 where nothing else is learnt, 0.003 beside skills",
    )
    warmup: float = Field(default=0.06, ge=0, le=1, description="fraction of the steps that the learning rate rises")
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    noise: bool = Field(default=False, description="draw routing weights from a relaxed Bernoulli in training")
    evaluate_every: int = Field(default=10, ge=1, description="steps between validations")
    patience: int = Field(default=3, ge=1, description="validations below the best that end the job")
    refit: float = Field(
        default=0.5, ge=0, le=1, description="share of the steps, the last ones, that learn from the held-out part too"
    )
    rest: int = Field(
        default=10, ge=0, description="steps that an example known by heart sits out, at most those of three epochs"
    )
    rank: int = Field(default=4, ge=1, le=256, description="rank of a `lora`")
    alpha: float = Field(default=16.0, gt=0, description="alpha of a `lora`; its scale is alpha / rank")

    def resolved(self, method: Method, num_examples: int) -> Hyperparameters:
        """With the method's defaults for so many examples to learn from in the place of what was left out."""
        trained_lr = _TRAINED_LR if num_examples > self.batch_size else _TRAINED_LR_OF_FEW
        defaults = {
            "adapter_lr": _LORA_LR if method is Method.LORA else trained_lr,
            "routing_lr": _ROUTING_ALONE_LR if method.routing_alone else _ROUTING_LR,
        }
        return self.model_copy(update={k: v for k, v in defaults.items() if getattr(self, k) is None})

    def used_by(self, method: Method) -> dict[str, Any]:
        """Those that make a difference to the method, as JSON."""
        unused: set[str] = set()
        if method is not Method.LORA:
            unused |= {"rank", "alpha"}
        if method.routing_alone:
            unused |= {"adapter_lr", "weight_decay"}
        if not method.learns_routing:
            unused |= {"routing_lr", "noise"}
        return self.model_dump(mode="json", exclude=unused)


@dataclass(frozen=True)
class AdaptSpec:
    """One adaptation, ready to run.

    `validation` holds examples that no step sees while states are compared. Those that were `drawn` from the task's own
    examples are learnt from in the end (`Hyperparameters.refit`); those that somebody set apart never are.
    """

    method: Method
    instruction: str
    examples: tuple[Example, ...]
    validation: tuple[Example, ...]
    prompt_format: str
    hyperparameters: Hyperparameters
    seed: int = 0
    drawn: bool = True


@dataclass(frozen=True)
class Served:
    """What answers for a task before it is adapted: an adapter, or None for the bare backbone, and its prompt."""

    adapter: Adapter | None
    instruction: str
    prompt_format: str


@dataclass(frozen=True)
class AdaptResult:
    """What was learnt: a routing (L, h, K) for the `-z` methods, else an adapter of its own.

    `before` and `after` are of the same held-out examples: what was served, and what was learnt before a refit.
    """

    routing: Tensor | None
    adapter: Adapter | None
    before: Validation
    after: Validation
    metrics: dict[str, Any]


class JobContext(Protocol):
    """What a running adaptation needs of whoever runs it."""

    def should_stop(self) -> bool:
        """Asked before every step."""
        ...

    def report(self, event: str, data: dict[str, Any]) -> None:
        """Told of every step (`step`) and every validation (`validation`)."""
        ...

    def save(self, checkpoint: bytes) -> None:
        """Given a state from which the same adaptation can go on; may raise what went wrong with an earlier one."""
        ...


class Stopped(Exception):
    """`should_stop` ended the adaptation before it was done; its last checkpoint stands."""


def split_examples(
    examples: Sequence[Example], validation: Sequence[Example] | None, fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(training, validation): the given validation examples, or a seeded part of the examples."""
    if validation is not None:
        return tuple(examples), tuple(validation)
    generator = torch.Generator().manual_seed(seed)
    kept, held_out = hold_out(examples, fraction, torch.randperm(len(examples), generator=generator).tolist())
    return tuple(kept), tuple(held_out)


def adapt(
    spec: AdaptSpec,
    backbone: Backbone,
    inventory: Inventory | None,
    served: Served | None,
    context: JobContext,
    checkpoint: bytes | None = None,
) -> AdaptResult:
    """Learn a task; what is returned is the latest state that does as well as any on the validation part.

    If nothing was lost by learning on, the last steps learn from the validation part too, where that was drawn.
    `served` is what to compare with; None is the bare backbone. Raises InvalidInput for examples over the
    context, Stopped when told to stop.
    """
    began = time.perf_counter()
    train, held_out = _encode_split(spec, backbone)
    learner = make_learner(spec, backbone, inventory)
    trainer = Trainer(backbone.model, inject(backbone.model), learner, _trainer_config(spec))
    before = _validate_served(trainer, served, spec, backbone)
    context.report("validation", {"step": 0, "of": "served", **asdict(before)})
    search = _Search(trainer, train, held_out, spec, context)
    if checkpoint is not None:
        search.load(checkpoint)
        context.report("from_checkpoint", {"step": trainer.step_count})
    search.run()
    after = search.restore_kept()
    metrics = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "kept_step": search.kept_step,
        "steps": trainer.step_count,
        "refit": search.refitted,
        "train_examples": len(train),
        "validation_examples": len(spec.validation),
        "trained_parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return _result(spec.method, learner, before, after, metrics)


def make_learner(spec: AdaptSpec, backbone: Backbone, inventory: Inventory | None) -> Learner:
    """The learner of a method, at its start."""
    generator = torch.Generator().manual_seed(spec.seed)
    method = spec.method
    if method is Method.LORA:
        sizes = linear_sizes(backbone.model)
        start = fresh_adapter(sizes, spec.hyperparameters.rank, spec.hyperparameters.alpha, generator)
        return PlainLearner(start).to(backbone.device)
    if inventory is None:
        raise InvalidInput(f"the method {method.value!r} needs an inventory", param="inventory")
    if method in (Method.MHR_MU, Method.POLY_MU):
        return mean_learner(inventory).to(backbone.device)
    return routing_learner(inventory, generator, train_skills=not method.routing_alone).to(backbone.device)


def validation_batches(examples: Sequence[EncodedExample]) -> list[Batch]:
    """Batches of similar length over all examples, in a fixed order."""
    ordered = sorted(examples, key=lambda example: example.length)
    return [collate(ordered[i : i + _VALIDATION_BATCH]) for i in range(0, len(ordered), _VALIDATION_BATCH)]


class _Search:
    """Training with early stopping: the latest state that is as good as any, kept with the trainer's in checkpoints.

    With the few examples that a job holds out, a small difference between two states is chance, and the one that
    learnt longer is the better bet. So a state is kept unless its accuracy falls behind the best one's by more. Where
    the latest is kept, the steps that are left learn from all examples: of a few, those held out are many to miss.
    """

    def __init__(
        self,
        trainer: Trainer,
        train: Sequence[EncodedExample],
        held_out: Sequence[EncodedExample],
        spec: AdaptSpec,
        context: JobContext,
    ) -> None:
        settings = spec.hyperparameters
        every = [*train, *held_out]
        self._trainer = trainer
        self._sampler = BatchSampler(train, settings.batch_size, spec.seed)
        self._refit_sampler = BatchSampler(every, settings.batch_size, spec.seed)
        self._rest = Rest(every, settings.rest, self._sampler.steps_per_epoch)
        self._validation = validation_batches(held_out)
        self._examples = len(held_out)
        self._settings = settings
        self._search_steps = settings.steps - (round(settings.steps * settings.refit) if spec.drawn else 0)
        self._context = context
        self._best_accuracy = 0.0
        self._kept: Validation | None = None
        self._kept_parameters: Mapping[str, Tensor] = {}
        self.kept_step = 0

    def run(self) -> None:
        if self._kept is None:
            self._validate()
        self._find()
        if self.kept_step >= self._search_steps:
            self._refit()

    @property
    def refitted(self) -> bool:
        """Whether what is kept has learnt from the held-out examples."""
        return self.kept_step > self._search_steps

    def _find(self) -> None:
        """Step on the training part and compare states, until one falls behind for too long."""
        for step in self._steps(self._sampler, self._search_steps):
            if self._is_due(step) or step == self._search_steps:
                self._validate()
                if step - self.kept_step >= self._settings.patience * self._settings.evaluate_every:
                    return
                self._context.save(self._state())

    def _refit(self) -> None:
        """Step on all examples with the steps that are left; there is nothing to compare their states by."""
        for step in self._steps(self._refit_sampler, self._settings.steps):
            if self._is_due(step) and step < self._settings.steps:
                self._context.save(self._state())
        self._kept_parameters, self.kept_step = self._trainer.copy_parameters(), self._trainer.step_count

    def _steps(self, sampler: BatchSampler, last: int) -> Iterator[int]:
        """Take steps up to number `last`, each reported; raises Stopped, the state saved, when told to stop."""
        piece_size = self._trainer.lanes.piece_size(self._settings.batch_size)
        batches = sampler.from_step(self._trainer.step_count, piece_size, rest=self._rest)
        while self._trainer.step_count < last:
            if self._context.should_stop():
                self._context.save(self._state())
                raise Stopped
            done = self._step(next(batches), sampler.sequences_per_step)
            step = self._trainer.step_count
            self._context.report("step", {"step": step, "steps": self._settings.steps, **done})
            yield step

    def _step(self, batches: Sequence[Batch], sequences: int) -> dict[str, Any]:
        """One step; returns its loss, to which the examples at rest have added nothing, and the number of those."""
        step = self._trainer.step_count
        examples = [example for batch in batches for example in batch.examples]
        at_rest = sequences - len(examples)
        loss = self._trainer.step(*batches, at_rest=at_rest)
        self._rest.note(examples, loss.of_sequences.tolist(), step)
        return {"loss": round(loss.mean.item(), 5), "at_rest": at_rest}

    def _is_due(self, step: int) -> bool:
        return step % self._settings.evaluate_every == 0

    def load(self, checkpoint: bytes) -> None:
        """Go on from a checkpoint of the same adaptation."""
        notes, self._kept_parameters = self._trainer.load_bytes(checkpoint)
        self._rest.load(notes.get("rests", self._rest.state()))  # checkpoints of older servers have none
        self._kept, self.kept_step = Validation(**notes["kept"]), notes["kept_step"]
        self._best_accuracy = notes["best_accuracy"]

    def restore_kept(self) -> Validation:
        """Put the kept state back; returns how good it was when it was last compared."""
        assert self._kept is not None
        self._trainer.load_parameters(self._kept_parameters)
        return self._kept

    def _validate(self) -> None:
        validation = self._trainer.validate(self._validation)
        step = self._trainer.step_count
        self._context.report("validation", {"step": step, "of": "learner", **asdict(validation)})
        self._best_accuracy = max(self._best_accuracy, validation.accuracy)
        if validation.accuracy >= self._best_accuracy - chance(self._best_accuracy, self._examples):
            self._kept, self.kept_step = validation, step
            self._kept_parameters = self._trainer.copy_parameters()

    def _state(self) -> bytes:
        assert self._kept is not None
        notes = {
            "kept": asdict(self._kept),
            "kept_step": self.kept_step,
            "best_accuracy": self._best_accuracy,
            "rests": self._rest.state(),
        }
        return self._trainer.to_bytes(notes, self._kept_parameters)


def _encode_split(spec: AdaptSpec, backbone: Backbone) -> tuple[list[EncodedExample], list[EncodedExample]]:
    train = _encode(spec.examples, "examples", spec.instruction, spec.prompt_format, backbone)
    held_out = _encode(spec.validation, "validation", spec.instruction, spec.prompt_format, backbone)
    return train, held_out


def _encode(
    examples: tuple[Example, ...], place: str, instruction: str, prompt_format: str, backbone: Backbone
) -> list[EncodedExample]:
    return encode_examples(
        backbone.tokenizer,
        examples,
        task=0,
        instruction=instruction,
        prompt_format=prompt_format,
        context_length=backbone.context_length,
        place=place,
    )


def _validate_served(trainer: Trainer, served: Served | None, spec: AdaptSpec, backbone: Backbone) -> Validation:
    """The held-out examples under what is served, with the prompt that it was made for."""
    served = served or Served(None, spec.instruction, spec.prompt_format)
    encoded = _encode(spec.validation, "validation", served.instruction, served.prompt_format, backbone)
    return trainer.validate(validation_batches(encoded), FixedLearner(served.adapter))


def _trainer_config(spec: AdaptSpec) -> TrainerConfig:
    settings = spec.hyperparameters.resolved(spec.method, len(spec.examples))
    assert settings.adapter_lr is not None
    assert settings.routing_lr is not None
    return TrainerConfig(
        steps=settings.steps,
        adapter_lr=settings.adapter_lr,
        routing_lr=settings.routing_lr,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        noise=settings.noise,
        seed=spec.seed,
    )


def _result(
    method: Method, learner: Learner, before: Validation, after: Validation, metrics: dict[str, Any]
) -> AdaptResult:
    if isinstance(learner, PlainLearner):
        return AdaptResult(None, learner.adapter(), before, after, metrics)
    assert isinstance(learner, RoutedLearner)
    if method.routing_alone:
        return AdaptResult(learner.routing[0].detach().cpu(), None, before, after, metrics)
    return AdaptResult(None, learner.adapter(0), before, after, metrics)
