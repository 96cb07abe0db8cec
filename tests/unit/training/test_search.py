from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.adapters.assembly import Adapter
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.training.adapt import AdaptResult, AdaptSpec, adapt
from server.training.batches import Batch
from server.training.examples import Example
from server.training.learners import Learner
from server.training.prompts import encode_prompt
from server.training.search import Stopped
from server.training.trainer import StepLoss, Trainer
from server.training.validation import Validation
from tests.support.adaptation import Recorder, learnt_adapter, make_spec, measure, serve


def _as_inventory(adapter: Adapter | None, backbone: Backbone) -> Inventory:
    """The inventory of one skill whose mean is the adapter."""
    assert adapter is not None
    A = {linear: pair.A[None, None] for linear, pair in adapter.weights.items()}
    B = {linear: pair.B[None, None] for linear, pair in adapter.weights.items()}
    return Inventory(A, B, adapter.alpha, backbone.fingerprint, backbone.name, "definition-input-output")


def test_early_stopping_ends_sooner_and_keeps_a_state_from_before_the_fall(
    backbone: Backbone, examples: list[Example]
) -> None:
    held_out = tuple(Example(example.input, ("q",)) for example in examples[:4])
    knowing = adapt(
        replace(make_spec(examples, "lora", steps=40), examples=held_out, validation=held_out),
        backbone,
        None,
        None,
        Recorder(),
    )
    assert knowing.after.accuracy == 1.0
    # Starts as what knows the held-out answers, and is taught others: it can only get worse.
    spec = replace(
        make_spec(examples, "poly-mu", steps=100, evaluate_every=2, patience=2), validation=held_out, drawn=False
    )
    result = adapt(spec, backbone, _as_inventory(knowing.adapter, backbone), None, Recorder())
    assert result.metrics["steps"] == result.metrics["kept_step"] + 4 < 100
    assert result.after.accuracy == 1.0


def test_of_states_that_are_alike_the_latest_is_kept(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    # No state ever says this, so that all are alike: nothing speaks for stopping.
    never = (Example("number 3", ("q",)), Example("number 4", ("q",)))
    spec = replace(make_spec(examples), validation=never, drawn=False)
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
    spec = make_spec(examples, steps=20)
    result = adapt(spec, backbone, inventory, None, Recorder())
    held_out = _prompts(spec.validation, backbone)
    assert len(held_out) == len(spec.validation)
    assert not held_out & set.union(*seen[:10])
    assert held_out <= set.union(*seen[10:])
    assert result.metrics["refit"]
    assert result.metrics["kept_step"] == result.metrics["steps"] == len(seen) == 20
    # What the held-out part said of the state before, it says better of what is returned.
    assert measure(spec, backbone, serve(result.adapter)).loss < result.after.loss


def test_a_refit_of_all_steps_searches_nothing(
    backbone: Backbone, inventory: Inventory, examples: list[Example], seen: list[set[tuple[int, ...]]]
) -> None:
    spec = make_spec(examples, steps=10, refit=1)
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert _prompts((*spec.examples, *spec.validation), backbone) == set.union(*seen)
    assert result.metrics["refit"]
    assert result.metrics["kept_step"] == result.metrics["steps"] == len(seen) == 10


def test_what_somebody_set_apart_is_never_learnt_from(
    backbone: Backbone, inventory: Inventory, examples: list[Example], seen: list[set[tuple[int, ...]]]
) -> None:
    spec = replace(make_spec(examples, steps=20), drawn=False)
    result = adapt(spec, backbone, inventory, None, Recorder())
    assert set.union(*seen) == _prompts(spec.examples, backbone)
    assert not result.metrics["refit"]


def test_where_no_state_that_has_learnt_is_kept_none_is_refitted(
    backbone: Backbone, inventory: Inventory, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(examples, steps=20)
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
    spec = make_spec(examples, steps=steps, evaluate_every=2, patience=3)
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
    spec = make_spec(examples, steps=20)
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
    for linear, pair in learnt_adapter(expected, inventory).weights.items():
        assert torch.equal(learnt_adapter(result, inventory).weights[linear].B, pair.B)


@pytest.fixture
def easily_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone's logits are too small for a loss much below 0.9."""
    monkeypatch.setattr("server.training.rest._KNOWN", 1.0)


def test_what_is_known_by_heart_rests_and_stays_known(
    backbone: Backbone, inventory: Inventory, examples: list[Example], easily_known: None
) -> None:
    def learn(rest: int) -> tuple[AdaptResult, Recorder]:
        recorder = Recorder()
        spec = make_spec(examples, steps=60, evaluate_every=60, batch_size=3, adapter_lr=3e-2, rest=rest)
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
    spec = make_spec(examples, steps=60, evaluate_every=60, batch_size=3, adapter_lr=3e-2)
    whole, second = Recorder(), Recorder()
    adapt(spec, backbone, inventory, None, whole)
    first = Recorder(stop_at=whole.losses.index(0.0))
    with pytest.raises(Stopped):
        adapt(spec, backbone, inventory, None, first)
    adapt(spec, backbone, inventory, None, second, first.checkpoint)
    assert second.losses[0] == 0.0
    assert first.losses + second.losses == whole.losses
