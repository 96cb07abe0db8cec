from __future__ import annotations

import pytest

from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.adapt import adapt
from server.training.examples import Example
from server.training.methods import Hyperparameters, Method
from tests.support.adaptation import Recorder, make_spec


@pytest.mark.parametrize(
    ("method", "heads", "complaint"),
    [("poly", 4, "use 'mhr'"), ("poly-z", 2, "use 'mhr-z'"), ("mhr", 1, "use 'poly'"), ("mhr-mu", 1, "use 'poly-mu'")],
)
def test_a_method_for_another_number_of_heads_is_refused(method: str, heads: int, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        Method(method).check_heads("inv", heads)


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
        adapt(make_spec(examples, method, **settings), backbone, inventory, None, recorder)
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
        adapt(
            make_spec(examples, method, **{"adapter_lr": None, name: rate}, steps=4),
            backbone,
            inventory,
            None,
            recorder,
        )
    unset, same, other = (recorder.losses for recorder in recorders)
    assert unset == same
    assert unset != other
