from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.adapt import (
    AdaptResult,
    AdaptSpec,
    Served,
    adapt,
    split_examples,
)
from server.training.batches import Batch
from server.training.checkpoint import Checkpoint
from server.training.examples import Example
from server.training.learners import Learner
from server.training.methods import Hyperparameters, Method
from server.training.prompts import encode_prompt
from server.training.search import Stopped
from server.training.trainer import StepLoss, Trainer
from server.training.validation import Validation
from tests.support.tiny_server import random_inventory


class Recorder:
    """A job context that remembers, and stops at a given step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.checkpoint: bytes | None = None
        self._stop_at = stop_at

    def should_stop(self) -> bool:
        return self._stop_at is not None and len(self.losses) >= self._stop_at

    def report(self, event: str, data: dict[str, Any]) -> None:
        self.events.append((event, data))

    def save(self, checkpoint: bytes) -> None:
        self.checkpoint = checkpoint

    @property
    def losses(self) -> list[float]:
        return [data["loss"] for event, data in self.events if event == "step"]

    @property
    def at_rest(self) -> list[int]:
        return [data["at_rest"] for event, data in self.events if event == "step"]


def _spec(examples: list[Example], method: str = "mhr", **settings: Any) -> AdaptSpec:
    settings = {"steps": 15, "evaluate_every": 5, "adapter_lr": 1e-2, **settings}
    train, validation = split_examples(examples, None, 0.25, seed=0)
    return AdaptSpec(
        Method(method), "Say it.", train, validation, "definition-input-output", Hyperparameters(**settings)
    )


def _as_inventory(adapter: Adapter | None, backbone: Backbone) -> Inventory:
    """The inventory of one skill whose mean is the adapter."""
    assert adapter is not None
    A = {linear: pair.A[None, None] for linear, pair in adapter.weights.items()}
    B = {linear: pair.B[None, None] for linear, pair in adapter.weights.items()}
    return Inventory(A, B, adapter.alpha, backbone.fingerprint, backbone.name, "definition-input-output")


def _served(adapter: Adapter | None, instruction: str = "Say it.") -> Served:
    return Served(adapter, instruction, "definition-input-output")


def _before(spec: AdaptSpec, backbone: Backbone, served: Served | None) -> Validation:
    """How good what is served is on the held-out examples."""
    once = replace(spec, method=Method.LORA, hyperparameters=Hyperparameters(steps=1))
    before = adapt(once, backbone, None, served, Recorder()).before
    assert before is not None
    return before


def _learnt(result: AdaptResult, inventory: Inventory) -> Adapter:
    if result.adapter is not None:
        return result.adapter
    assert result.routing is not None
    return assemble(inventory, result.routing)


@pytest.mark.parametrize("method", list(Method))
def test_every_method_learns_the_task(backbone: Backbone, examples: list[Example], method: Method) -> None:
    inventory = random_inventory(backbone, num_heads=1 if method.value.startswith("poly") else 4)
    recorder = Recorder()
    result = adapt(
        _spec(examples, method, refit=0),
        backbone,
        inventory if method.needs_inventory else None,
        _served(mean_adapter(inventory)),
        recorder,
    )
    assert result.before is not None
    assert result.after.better_than(result.before)
    assert result.metrics["loss_after"] < result.metrics["loss_before"]
    assert (result.routing is not None) == method.routing_alone
    assert (result.adapter is not None) != method.routing_alone
    # Without a refit, what is returned is what was measured: the best state, not the last one.
    served = _served(_learnt(result, inventory))
    before = _before(_spec(examples, method), backbone, served)
    assert before.loss == pytest.approx(result.after.loss, rel=1e-3)
    assert before.accuracy == pytest.approx(result.after.accuracy, abs=1e-3)


def test_a_routing_alone_is_small_and_says_so(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    result = adapt(_spec(examples, "mhr-z"), backbone, inventory, None, Recorder())
    assert result.routing is not None
    assert result.routing.shape == inventory.routing_shape
    assert result.metrics["trained_parameters"] == result.routing.numel()


@pytest.mark.parametrize(("rank", "trained"), [(4, "a LoRA beside the skills"), (0, "the skills")])
def test_mhr_learns_a_lora_beside_the_skills_or_the_skills_themselves(
    backbone: Backbone, inventory: Inventory, examples: list[Example], rank: int, trained: str
) -> None:
    result = adapt(_spec(examples, steps=2, rank=rank), backbone, inventory, None, Recorder())
    assert result.adapter is not None
    of_rank = (
        sum(pair.A.numel() + pair.B.numel() for pair in mean_adapter(inventory).weights.values()) // inventory.rank
    )
    ranks = {"a LoRA beside the skills": 4, "the skills": inventory.num_skills * inventory.rank}[trained]
    routing = math.prod(inventory.routing_shape)
    assert result.metrics["trained_parameters"] == routing + ranks * of_rank
    assert result.adapter.rank == inventory.rank + rank


def test_a_lora_is_learnt_beside_those_linears_that_the_inventory_has(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    some = [linear for linear in inventory.linears if linear.endswith("q_proj")]
    smaller = Inventory(
        {linear: inventory.A[linear] for linear in some},
        {linear: inventory.B[linear] for linear in some},
        inventory.alpha,
        backbone.fingerprint,
        backbone.name,
        "definition-input-output",
    )
    result = adapt(_spec(examples, steps=2), backbone, smaller, None, Recorder())
    assert result.adapter is not None
    assert list(result.adapter.weights) == some


def test_early_stopping_ends_sooner_and_keeps_a_state_from_before_the_fall(
    backbone: Backbone, examples: list[Example]
) -> None:
    held_out = tuple(Example(example.input, ("q",)) for example in examples[:4])
    knowing = adapt(
        replace(_spec(examples, "lora", steps=40), examples=held_out, validation=held_out),
        backbone,
        None,
        None,
        Recorder(),
    )
    assert knowing.after.accuracy == 1.0
    # Starts as what knows the held-out answers, and is taught others: it can only get worse.
    spec = replace(
        _spec(examples, "poly-mu", steps=100, evaluate_every=2, patience=2), validation=held_out, drawn=False
    )
    result = adapt(spec, backbone, _as_inventory(knowing.adapter, backbone), None, Recorder())
    assert result.metrics["steps"] == result.metrics["kept_step"] + 4 < 100
    assert result.after.accuracy == 1.0


def test_of_states_that_are_alike_the_latest_is_kept(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    # No state ever says this, so that all are alike: nothing speaks for stopping.
    never = (Example("number 3", ("q",)), Example("number 4", ("q",)))
    spec = replace(_spec(examples), validation=never, drawn=False)
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert result.after.accuracy <= 0.5
    assert result.metrics["kept_step"] == result.metrics["steps"] == 15


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[set[tuple[int, ...]]]:
    """The prompts of every step that a trainer takes."""
    steps: list[set[tuple[int, ...]]] = []
    step = Trainer.step

    def note(self: Trainer, *batches: Batch, at_rest: int = 0) -> StepLoss:
        steps.append({example.prompt for batch in batches for example in batch.examples})
        return step(self, *batches, at_rest=at_rest)

    monkeypatch.setattr(Trainer, "step", note)
    return steps


def _prompts(examples: tuple[Example, ...], backbone: Backbone) -> set[tuple[int, ...]]:
    return {
        tuple(encode_prompt(backbone.tokenizer, f"Definition: Say it.\n\nInput: {e.input}\n\nOutput:"))
        for e in examples
    }


def test_the_last_half_of_the_steps_learns_from_what_was_held_out_too(
    backbone: Backbone, inventory: Inventory, examples: list[Example], seen: list[set[tuple[int, ...]]]
) -> None:
    spec = _spec(examples, steps=20)
    result = adapt(spec, backbone, inventory, None, Recorder())
    held_out = _prompts(spec.validation, backbone)
    assert len(held_out) == len(spec.validation)
    assert not held_out & set.union(*seen[:10])
    assert held_out <= set.union(*seen[10:])
    assert result.metrics["refit"]
    assert result.metrics["kept_step"] == result.metrics["steps"] == len(seen) == 20
    # What the held-out part said of the state before, it says better of what is returned.
    assert _before(spec, backbone, _served(result.adapter)).loss < result.after.loss


def test_a_refit_of_all_steps_searches_nothing(
    backbone: Backbone, inventory: Inventory, examples: list[Example], seen: list[set[tuple[int, ...]]]
) -> None:
    spec = _spec(examples, steps=10, refit=1)
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert _prompts((*spec.examples, *spec.validation), backbone) == set.union(*seen)
    assert result.metrics["refit"]
    assert result.metrics["kept_step"] == result.metrics["steps"] == len(seen) == 10


def test_what_somebody_set_apart_is_never_learnt_from(
    backbone: Backbone, inventory: Inventory, examples: list[Example], seen: list[set[tuple[int, ...]]]
) -> None:
    spec = replace(_spec(examples, steps=20), drawn=False)
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert set.union(*seen) == _prompts(spec.examples, backbone)
    assert not result.metrics["refit"]


def test_where_no_state_that_has_learnt_is_kept_none_is_refitted(
    backbone: Backbone, inventory: Inventory, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(examples, steps=20)
    verdicts = iter([Validation(0.5, 1.0), Validation(1.0, 0.5), *[Validation(0.0, 2.0)] * 9])
    monkeypatch.setattr(Trainer, "validate", lambda *args: [next(verdicts)] * len(spec.validation))
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert not result.metrics["refit"]
    assert result.metrics["kept_step"] == 0
    assert result.metrics["steps"] == 10


def _fall_behind_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make states until the step good on what is held out, and later ones not."""

    def validate(self: Trainer, batches: Sequence[Batch], learner: Learner | None = None) -> list[Validation]:
        verdict = Validation(1.0, 0.5) if self.step_count <= step else Validation(0.0, 2.0)
        return [verdict for batch in batches for _ in batch.examples]

    monkeypatch.setattr(Trainer, "validate", validate)


def _changed(spec: AdaptSpec, **settings: Any) -> AdaptSpec:
    return replace(spec, hyperparameters=spec.hyperparameters.model_copy(update=settings))


@pytest.mark.parametrize("steps", [20, 40])
def test_a_refit_goes_on_from_the_state_before_the_fall(
    backbone: Backbone,
    inventory: Inventory,
    examples: list[Example],
    seen: list[set[tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    spec = _spec(examples, steps=steps, evaluate_every=2, patience=3)
    _fall_behind_after(2, monkeypatch)
    starts: list[dict[str, torch.Tensor]] = []
    load = Trainer.load_parameters

    def note(self: Trainer, values: dict[str, torch.Tensor]) -> None:
        starts.append(values)
        load(self, values)

    monkeypatch.setattr(Trainer, "load_parameters", note)
    recorder = Recorder()
    result = adapt(spec, backbone, inventory, None, recorder)
    searched = 8  # after three validations below the best, sooner than half of the steps
    assert ("refit", {"from_step": 2}) in recorder.events
    assert not _prompts(spec.validation, backbone) & set.union(*seen[:searched])
    assert _prompts(spec.validation, backbone) <= set.union(*seen[searched:])
    assert len(seen) == searched + steps // 2
    assert result.metrics["refit"]
    assert result.metrics["kept_step"] == result.metrics["steps"] == steps
    assert result.after == Validation(1.0, 0.5)
    # The state of step 2, from which a job that searches less goes on too.
    adapt(_changed(spec, patience=1), backbone, inventory, None, Recorder())
    assert starts[0].keys() == starts[2].keys()
    for name, tensor in starts[0].items():
        assert torch.equal(tensor, starts[2][name])


@pytest.mark.parametrize("fell_behind", [False, True])
@pytest.mark.parametrize("stop_at", [12, 15])
def test_a_refit_taken_up_again_ends_as_if_it_had_not_stopped(
    backbone: Backbone,
    inventory: Inventory,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
    fell_behind: bool,
) -> None:
    spec = _spec(examples, steps=20)
    if fell_behind:
        _fall_behind_after(5, monkeypatch)
    whole, first, second = Recorder(), Recorder(stop_at), Recorder()
    expected = adapt(spec, backbone, inventory, None, whole)
    with pytest.raises(Stopped):
        adapt(spec, backbone, inventory, None, first)
    result = adapt(spec, backbone, inventory, None, second, first.checkpoint)
    assert first.losses + second.losses == whole.losses
    assert result.metrics["refit"]
    assert result.after == expected.after
    for linear, pair in _learnt(expected, inventory).weights.items():
        assert torch.equal(_learnt(result, inventory).weights[linear].B, pair.B)


def test_what_is_served_is_measured_with_its_own_instruction(backbone: Backbone, examples: list[Example]) -> None:
    spec = _spec(examples, "lora")
    same = _before(spec, backbone, _served(None))
    other = _before(spec, backbone, _served(None, "Say something else."))
    assert _before(spec, backbone, None) == same
    assert other.loss != same.loss


def test_what_is_served_is_not_compared_on_what_it_learnt_from(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    spec = _spec(examples, steps=5)
    first, *others = spec.validation
    served = replace(_served(mean_adapter(inventory)), learnt=frozenset({first}))
    result = adapt(spec, backbone, inventory, served, Recorder())
    alone = adapt(
        replace(spec, validation=tuple(others)), backbone, inventory, replace(served, learnt=frozenset()), Recorder()
    )
    assert result.metrics["validation_examples"] == 3
    assert result.metrics["compared_examples"] == alone.metrics["compared_examples"] == 2
    assert result.before == alone.before
    assert (result.after.accuracy, result.after.loss) == pytest.approx((alone.after.accuracy, alone.after.loss))


def test_what_knows_all_held_out_examples_is_compared_with_nothing(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    spec, recorder = _spec(examples, steps=5), Recorder()
    result = adapt(spec, backbone, inventory, replace(_served(None), learnt=frozenset(examples)), recorder)
    assert result.before is None
    assert result.metrics["accuracy_before"] is None
    assert result.metrics["compared_examples"] == 0
    assert [data["of"] for event, data in recorder.events if event == "validation"] == ["learner", "learner"]
    assert result.after == adapt(spec, backbone, inventory, None, Recorder()).after


def test_an_adaptation_taken_up_again_ends_as_if_it_had_not_stopped(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    whole = Recorder()
    expected = adapt(_spec(examples), backbone, inventory, None, whole)
    first = Recorder(stop_at=7)
    with pytest.raises(Stopped):
        adapt(_spec(examples), backbone, inventory, None, first)
    second = Recorder()
    result = adapt(_spec(examples), backbone, inventory, None, second, first.checkpoint)
    assert first.losses + second.losses == whole.losses
    assert ("from_checkpoint", {"step": 7}) in second.events
    assert result.adapter is not None
    assert expected.adapter is not None
    for linear, pair in expected.adapter.weights.items():
        assert torch.equal(result.adapter.weights[linear].A, pair.A)


def _of_other_settings(checkpoint: Checkpoint) -> bytes:
    return replace(checkpoint, config={**checkpoint.config, "adapter_lr": 0.5}).to_bytes()


def _of_other_notes(checkpoint: Checkpoint) -> bytes:
    return replace(checkpoint, notes={"kept_step": 0}).to_bytes()


def _of_another_inventory(checkpoint: Checkpoint) -> bytes:
    routing = "parameter.mixture.routing"
    smaller = {**checkpoint.tensors, routing: checkpoint.tensors[routing][..., :2]}
    return replace(checkpoint, tensors=smaller).to_bytes()


def _of_another_learner(checkpoint: Checkpoint) -> bytes:
    others = {name.replace("beside.A.0", "A.0"): tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=others).to_bytes()


def _damaged(checkpoint: Checkpoint) -> bytes:
    return checkpoint.to_bytes()[:-1]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_of_other_settings, "made with other settings (adapter_lr was 0.5 and is 0.01)"),
        (_of_other_notes, "of another version of the server: no best_accuracy, rests, validations"),
        (_of_another_inventory, "of other parameters (mixture.routing was (1, 14, 4, 2) and is (1, 14, 4, 3))"),
        (_of_another_learner, "of other parameters (A.0 was"),
        (_damaged, "not a file of the form"),
    ],
)
def test_an_adaptation_begins_anew_where_its_checkpoint_cannot_be_used(
    backbone: Backbone,
    inventory: Inventory,
    examples: list[Example],
    spoil: Callable[[Checkpoint], bytes],
    reason: str,
) -> None:
    whole, first, second = Recorder(), Recorder(stop_at=7), Recorder()
    adapt(_spec(examples), backbone, inventory, None, whole)
    with pytest.raises(Stopped):
        adapt(_spec(examples), backbone, inventory, None, first)
    assert first.checkpoint is not None
    adapt(_spec(examples), backbone, inventory, None, second, spoil(Checkpoint.from_bytes(first.checkpoint)))
    assert second.losses == whole.losses
    [unusable] = [data for event, data in second.events if event == "checkpoint_unusable"]
    assert reason in unusable["reason"]


@pytest.fixture
def easily_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone's logits are too small for a loss much below 0.9."""
    monkeypatch.setattr("server.training.rest._KNOWN", 1.0)


def test_what_is_known_by_heart_rests_and_stays_known(
    backbone: Backbone, inventory: Inventory, examples: list[Example], easily_known: None
) -> None:
    def learn(rest: int) -> tuple[AdaptResult, Recorder]:
        recorder = Recorder()
        spec = _spec(examples, steps=60, evaluate_every=60, batch_size=3, adapter_lr=3e-2, rest=rest)
        spec = replace(spec, validation=spec.examples, drawn=False)
        return adapt(spec, backbone, inventory, None, recorder), recorder

    (always, without), (resting, recorder) = learn(0), learn(10)
    assert set(without.at_rest) == {0}
    assert recorder.at_rest.count(3) > 20  # all of a step's sequences
    before = next(step for step, number in enumerate(recorder.at_rest) if number)
    assert recorder.losses[:before] == without.losses[:before]
    assert resting.after.accuracy == always.after.accuracy == 1.0
    assert resting.after.loss < 1.0


def test_a_rest_outlasts_a_stop(
    backbone: Backbone, inventory: Inventory, examples: list[Example], easily_known: None
) -> None:
    spec = _spec(examples, steps=60, evaluate_every=60, batch_size=3, adapter_lr=3e-2)
    whole, second = Recorder(), Recorder()
    adapt(spec, backbone, inventory, None, whole)
    first = Recorder(stop_at=whole.losses.index(0.0))
    with pytest.raises(Stopped):
        adapt(spec, backbone, inventory, None, first)
    adapt(spec, backbone, inventory, None, second, first.checkpoint)
    assert second.losses[0] == 0.0
    assert first.losses + second.losses == whole.losses


def test_the_seed_decides(backbone: Backbone, inventory: Inventory, examples: list[Example]) -> None:
    def losses(seed: int) -> list[float]:
        recorder = Recorder()
        adapt(replace(_spec(examples), seed=seed), backbone, inventory, None, recorder)
        return recorder.losses

    assert losses(1) == losses(1) != losses(2)


def test_given_validation_examples_are_never_trained_on(examples: list[Example]) -> None:
    held = [Example("a", ("b",))]
    assert split_examples(examples, held, 0.25, 0) == (tuple(examples), tuple(held))
    train, validation = split_examples(examples, None, 0.25, 0)
    assert len(validation) == 3
    assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("method", "heads", "complaint"),
    [("poly", 4, "use 'mhr'"), ("poly-z", 2, "use 'mhr-z'"), ("mhr", 1, "use 'poly'"), ("mhr-mu", 1, "use 'poly-mu'")],
)
def test_a_method_for_another_number_of_heads_is_refused(method: str, heads: int, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        Method(method).check_heads("inv", heads)


def test_a_method_without_its_inventory_is_refused(backbone: Backbone, examples: list[Example]) -> None:
    with pytest.raises(InvalidInput, match="'mhr' needs an inventory"):
        adapt(_spec(examples), backbone, None, None, Recorder())


@pytest.mark.parametrize(
    ("method", "rate"), [(Method.LORA, 0.0015), (Method.MHR, 0.0015), (Method.MHR_MU, 0.0005), (Method.POLY, 0.0015)]
)
def test_what_begins_trained_learns_with_smaller_steps(method: Method, rate: float) -> None:
    assert Hyperparameters().resolved(method).adapter_lr == rate
    assert Hyperparameters(rank=0).resolved(Method.MHR).adapter_lr == 0.0005
    assert Hyperparameters(adapter_lr=0.02).resolved(method).adapter_lr == 0.02


@pytest.mark.parametrize(("method", "rate"), [(Method.MHR, 0.003), (Method.POLY, 0.003), (Method.MHR_Z, 0.15)])
def test_routing_learns_with_smaller_steps_beside_others(method: Method, rate: float) -> None:
    assert Hyperparameters().resolved(method).routing_lr == rate
    assert Hyperparameters(routing_lr=0.2).resolved(method).routing_lr == 0.2


def test_a_lora_of_no_rank_is_refused() -> None:
    Hyperparameters(rank=0).check(Method.MHR)
    with pytest.raises(InvalidInput, match="'lora' needs a rank of at least 1"):
        Hyperparameters(rank=0).check(Method.LORA)


@pytest.mark.parametrize(("method", "rank"), [("mhr", 0), ("mhr-z", 4), ("mhr-mu", 4), ("lora", 4)])
def test_hyperparameters_that_a_method_does_not_use_change_nothing(
    backbone: Backbone, inventory: Inventory, examples: list[Example], method: str, rank: int
) -> None:
    others = {"adapter_lr": 0.5, "routing_lr": 5.0, "weight_decay": 0.9, "noise": True, "rank": 7, "alpha": 3.0}
    idle = Hyperparameters(rank=rank).idle_in(Method(method))
    assert idle
    assert not idle & Hyperparameters(rank=rank).used_by(Method(method)).keys()
    given = {"adapter_lr": None, "steps": 3, "rank": rank}
    recorders = [Recorder(), Recorder()]
    for settings, recorder in zip((given, given | {name: others[name] for name in idle}), recorders, strict=True):
        adapt(_spec(examples, method, **settings), backbone, inventory, None, recorder)
    assert recorders[0].losses == recorders[1].losses


@pytest.mark.parametrize(
    ("method", "name", "own", "another"),
    [("mhr", "adapter_lr", 1.5e-3, 3e-3), ("mhr", "routing_lr", 0.003, 0.3), ("mhr-z", "routing_lr", 0.15, 0.03)],
)
def test_an_adaptation_that_asks_for_no_learning_rate_takes_its_methods(
    backbone: Backbone,
    inventory: Inventory,
    examples: list[Example],
    method: str,
    name: str,
    own: float,
    another: float,
) -> None:
    recorders = [Recorder() for _ in range(3)]
    for rate, recorder in zip((None, own, another), recorders, strict=True):
        adapt(_spec(examples, method, **{"adapter_lr": None, name: rate}, steps=4), backbone, inventory, None, recorder)
    unset, same, other = (recorder.losses for recorder in recorders)
    assert unset == same
    assert unset != other
