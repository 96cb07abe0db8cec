from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.adapters.assembly import mean_adapter
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.adapt import adapt, split_examples
from server.training.checkpoint import Checkpoint
from server.training.examples import Example
from server.training.methods import Method
from server.training.search import Stopped
from tests.support.adaptation import Recorder, learnt_adapter, make_spec, measure, serve
from tests.support.tiny_server import random_inventory


@pytest.mark.parametrize("method", list(Method))
def test_every_method_learns_the_task(backbone: Backbone, examples: list[Example], method: Method) -> None:
    inventory = random_inventory(backbone, num_heads=1 if method.value.startswith("poly") else 4)
    recorder = Recorder()
    result = adapt(
        make_spec(examples, method, refit=0),
        backbone,
        inventory if method.needs_inventory else None,
        serve(mean_adapter(inventory)),
        recorder,
    )
    assert result.before is not None
    assert result.after.better_than(result.before)
    assert result.metrics["loss_after"] < result.metrics["loss_before"]
    assert (result.routing is not None) == method.routing_alone
    assert (result.adapter is not None) != method.routing_alone
    # Without a refit, what is returned is what was measured: the best state, not the last one.
    served = serve(learnt_adapter(result, inventory))
    before = measure(make_spec(examples, method), backbone, served)
    assert before.loss == pytest.approx(result.after.loss, rel=1e-3)
    assert before.accuracy == pytest.approx(result.after.accuracy, abs=1e-3)


def test_a_routing_alone_is_small_and_says_so(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    result = adapt(make_spec(examples, "mhr-z"), backbone, inventory, None, Recorder())
    assert result.routing is not None
    assert result.routing.shape == inventory.routing_shape
    assert result.metrics["trained_parameters"] == result.routing.numel()


@pytest.mark.parametrize(("rank", "trained"), [(4, "a LoRA beside the skills"), (0, "the skills")])
def test_mhr_learns_a_lora_beside_the_skills_or_the_skills_themselves(
    backbone: Backbone, inventory: Inventory, examples: list[Example], rank: int, trained: str
) -> None:
    result = adapt(make_spec(examples, steps=2, rank=rank), backbone, inventory, None, Recorder())
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
    result = adapt(make_spec(examples, steps=2), backbone, smaller, None, Recorder())
    assert result.adapter is not None
    assert list(result.adapter.weights) == some


def test_what_is_served_is_measured_with_its_own_instruction(backbone: Backbone, examples: list[Example]) -> None:
    spec = make_spec(examples, "lora")
    same = measure(spec, backbone, serve(None))
    other = measure(spec, backbone, serve(None, "Say something else."))
    assert measure(spec, backbone, None) == same
    assert other.loss != same.loss


def test_what_is_served_is_not_compared_on_what_it_learnt_from(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    spec = make_spec(examples, steps=5)
    first, *others = spec.validation
    served = replace(serve(mean_adapter(inventory)), learnt=frozenset({first}))
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
    spec, recorder = make_spec(examples, steps=5), Recorder()
    result = adapt(spec, backbone, inventory, replace(serve(None), learnt=frozenset(examples)), recorder)
    assert result.before is None
    assert result.metrics["accuracy_before"] is None
    assert result.metrics["compared_examples"] == 0
    assert [data["of"] for event, data in recorder.events if event == "validation"] == ["learner", "learner"]
    assert result.after == adapt(spec, backbone, inventory, None, Recorder()).after


def test_an_adaptation_taken_up_again_ends_as_if_it_had_not_stopped(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    whole = Recorder()
    expected = adapt(make_spec(examples), backbone, inventory, None, whole)
    first = Recorder(stop_at=7)
    with pytest.raises(Stopped):
        adapt(make_spec(examples), backbone, inventory, None, first)
    second = Recorder()
    result = adapt(make_spec(examples), backbone, inventory, None, second, first.checkpoint)
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
    adapt(make_spec(examples), backbone, inventory, None, whole)
    with pytest.raises(Stopped):
        adapt(make_spec(examples), backbone, inventory, None, first)
    assert first.checkpoint is not None
    adapt(make_spec(examples), backbone, inventory, None, second, spoil(Checkpoint.from_bytes(first.checkpoint)))
    assert second.losses == whole.losses
    [unusable] = [data for event, data in second.events if event == "checkpoint_unusable"]
    assert reason in unusable["reason"]


def test_the_seed_decides(backbone: Backbone, inventory: Inventory, examples: list[Example]) -> None:
    def losses(seed: int) -> list[float]:
        recorder = Recorder()
        adapt(replace(make_spec(examples), seed=seed), backbone, inventory, None, recorder)
        return recorder.losses

    assert losses(1) == losses(1) != losses(2)


def test_given_validation_examples_are_never_trained_on(examples: list[Example]) -> None:
    held = [Example("a", ("b",))]
    assert split_examples(examples, held, 0.25, 0) == (tuple(examples), tuple(held))
    train, validation = split_examples(examples, None, 0.25, 0)
    assert len(validation) == 3
    assert not set(train) & set(validation)


def test_a_method_without_its_inventory_is_refused(backbone: Backbone, examples: list[Example]) -> None:
    with pytest.raises(InvalidInput, match="'mhr' needs an inventory"):
        adapt(make_spec(examples), backbone, None, None, Recorder())
