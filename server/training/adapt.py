"""Few-shot adaptation: a new task learnt from a handful of examples, by any method of the paper."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.assembly import Adapter
from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import EncodedExample, encode_examples
from server.training.examples import Example, hold_out
from server.training.learners import (
    AugmentedLearner,
    FixedLearner,
    Learner,
    PlainLearner,
    RoutedLearner,
    fresh_adapter,
    mean_learner,
    routing_learner,
)
from server.training.methods import Hyperparameters, Method
from server.training.search import JobContext, Search, validate_each
from server.training.trainer import Trainer, TrainerConfig
from server.training.validation import Validation


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
    """What answers for a task before it is adapted: an adapter, or None for the bare backbone, and its prompt.

    Examples that it was `learnt` from cannot say how good it is.
    """

    adapter: Adapter | None
    instruction: str
    prompt_format: str
    learnt: frozenset[Example] = frozenset()


@dataclass(frozen=True)
class AdaptResult:
    """What was learnt: a routing (L, h, K) for the `-z` methods, else an adapter of its own.

    `before` and `after` are of the same held-out examples, those that what was served had not learnt from: what was
    served, and what was learnt before a refit. If it had learnt from all, `before` is None and `after` is of all.
    """

    routing: Tensor | None
    adapter: Adapter | None
    before: Validation | None
    after: Validation
    metrics: dict[str, Any]


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
    `served` is what to compare with; None is the bare backbone. A `checkpoint` that is damaged or of another version
    of the server is reported and left aside. Raises InvalidInput for examples over the context, Stopped when told to
    stop.
    """
    began = time.perf_counter()
    served = served or Served(None, spec.instruction, spec.prompt_format)
    train, held_out = _encode_split(spec, backbone)
    learner = make_learner(spec, backbone, inventory)
    trainer = Trainer(backbone.model, inject(backbone.model), learner, _trainer_config(spec))
    compared = [place for place, example in enumerate(spec.validation) if example not in served.learnt]
    before = _validate_served(trainer, served, [spec.validation[place] for place in compared], backbone)
    if before is not None:
        context.report("validation", {"step": 0, "of": "served", **asdict(before)})
    search = Search(trainer, train, held_out, spec.hyperparameters, context, refit=spec.drawn)
    if checkpoint is not None:
        _take_up(checkpoint, search, trainer, context)
    search.run()
    of_each = search.restore_kept()
    after = Validation.mean([of_each[place] for place in compared] or of_each)
    metrics = {
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after.accuracy,
        "loss_before": before and before.loss,
        "loss_after": after.loss,
        "kept_step": search.kept_step,
        "steps": trainer.step_count,
        "refit": search.refitted,
        "train_examples": len(train),
        "validation_examples": len(spec.validation),
        "compared_examples": len(compared),
        "trained_parameters": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return _result(spec.method, learner, before, after, metrics)


def make_learner(spec: AdaptSpec, backbone: Backbone, inventory: Inventory | None) -> Learner:
    """The learner of a method, at its start."""
    generator = torch.Generator().manual_seed(spec.seed)
    method, settings = spec.method, spec.hyperparameters
    sizes = linear_sizes(backbone.model)
    if method is Method.LORA:
        return _fresh_lora(sizes, settings, generator).to(backbone.device)
    if inventory is None:
        raise InvalidInput(f"the method {method.value!r} needs an inventory", param="inventory")
    if method.tunes_mean:
        return mean_learner(inventory).to(backbone.device)
    train_skills = not method.routing_alone and settings.rank == 0
    mixture = routing_learner(inventory, generator, train_skills=train_skills)
    if method.routing_alone or train_skills:
        return mixture.to(backbone.device)
    covered = {linear: size for linear, size in sizes.items() if linear in inventory.A}
    return AugmentedLearner(mixture, _fresh_lora(covered, settings, generator)).to(backbone.device)


def _fresh_lora(
    sizes: Mapping[str, tuple[int, int]], settings: Hyperparameters, generator: torch.Generator
) -> PlainLearner:
    return PlainLearner(fresh_adapter(sizes, settings.rank, settings.alpha, generator))


def _take_up(checkpoint: bytes, search: Search, trainer: Trainer, context: JobContext) -> None:
    """Go on from a checkpoint; where that cannot be done, learn from the start, which costs minutes and no job."""
    try:
        search.load(checkpoint)
    except InvalidInput as error:
        context.report("checkpoint_unusable", {"reason": error.message})
    else:
        context.report("from_checkpoint", {"step": trainer.step_count})


def _encode_split(spec: AdaptSpec, backbone: Backbone) -> tuple[list[EncodedExample], list[EncodedExample]]:
    train = _encode(spec.examples, "examples", spec.instruction, spec.prompt_format, backbone)
    held_out = _encode(spec.validation, "validation", spec.instruction, spec.prompt_format, backbone)
    return train, held_out


def _encode(
    examples: Sequence[Example], place: str, instruction: str, prompt_format: str, backbone: Backbone
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


def _validate_served(
    trainer: Trainer, served: Served, examples: Sequence[Example], backbone: Backbone
) -> Validation | None:
    """Held-out examples under what is served, with the prompt that it was made for; None of none."""
    if not examples:
        return None
    encoded = _encode(examples, "validation", served.instruction, served.prompt_format, backbone)
    return Validation.mean(validate_each(trainer, encoded, FixedLearner(served.adapter)))


def _trainer_config(spec: AdaptSpec) -> TrainerConfig:
    settings = spec.hyperparameters.resolved(spec.method)
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
    method: Method, learner: Learner, before: Validation | None, after: Validation, metrics: dict[str, Any]
) -> AdaptResult:
    if isinstance(learner, PlainLearner | AugmentedLearner):
        return AdaptResult(None, learner.adapter(), before, after, metrics)
    assert isinstance(learner, RoutedLearner)
    if method.routing_alone:
        return AdaptResult(learner.routing[0].detach().cpu(), None, before, after, metrics)
    return AdaptResult(None, learner.adapter(0), before, after, metrics)
