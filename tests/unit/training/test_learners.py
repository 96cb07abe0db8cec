from __future__ import annotations

import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter, side_by_side
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.training.learners import (
    AugmentedLearner,
    FixedLearner,
    Learner,
    PlainLearner,
    RoutedLearner,
    fresh_adapter,
    fresh_skills,
    mean_learner,
    routing_learner,
)


def _check_same(learner: Learner, task: int, expected: Adapter) -> None:
    adapters = learner.adapters(torch.tensor([task]), torch.float32)
    assert set(adapters) == set(expected.weights)
    for linear, pair in expected.weights.items():
        A, B = adapters[linear]
        torch.testing.assert_close(A[0], pair.A)
        torch.testing.assert_close(B[0], pair.B * expected.scaling)


def test_a_routed_learner_makes_the_adapters_that_assembly_makes(inventory: Inventory) -> None:
    routings = torch.stack(list(inventory.routings.values()))
    learner = RoutedLearner(inventory, routings, train_skills=True)
    for task, logits in enumerate(routings):
        _check_same(learner, task, assemble(inventory, logits))
        for linear, pair in learner.adapter(task).weights.items():
            torch.testing.assert_close(pair.A, assemble(inventory, logits).weights[linear].A)


def test_learnt_skills_come_back_in_the_inventorys_order(inventory: Inventory) -> None:
    learner = RoutedLearner(inventory, torch.zeros(1, *inventory.routing_shape), train_skills=True)
    A, B = learner.skills()
    assert list(A) == list(B) == list(inventory.linears)
    for linear in inventory.linears:
        assert torch.equal(A[linear], inventory.A[linear].float())
        assert torch.equal(B[linear], inventory.B[linear].float())


def test_a_new_task_starts_near_the_mean(inventory: Inventory) -> None:
    learner = routing_learner(inventory, torch.Generator().manual_seed(0), train_skills=True)
    mean = mean_adapter(inventory)
    for linear, pair in learner.adapter(0).weights.items():
        torch.testing.assert_close(pair.A, mean.weights[linear].A, atol=2e-3, rtol=0)


def test_what_is_trained_is_what_the_method_says(inventory: Inventory) -> None:
    generator = torch.Generator().manual_seed(0)
    routing_alone = routing_learner(inventory, generator, train_skills=False)
    assert routing_alone.adapter_parameters() == []
    assert [p.numel() for p in routing_alone.routing_parameters()] == [inventory.routings["rhyme"].numel()]
    everything = routing_learner(inventory, generator, train_skills=True)
    skills = sum(t.numel() for t in [*inventory.A.values(), *inventory.B.values()])
    assert sum(p.numel() for p in everything.adapter_parameters()) == skills
    assert mean_learner(inventory).routing_parameters() == []


def test_an_adapter_beside_the_skills_adds_to_what_a_mixture_does(inventory: Inventory) -> None:
    generator = torch.Generator().manual_seed(0)
    mixture = routing_learner(inventory, generator, train_skills=False)
    sizes = {linear: (pair.A.shape[0], pair.B.shape[1]) for linear, pair in mean_adapter(inventory).weights.items()}
    beside = PlainLearner(fresh_adapter(sizes, rank=3, alpha=5.0, generator=generator))
    learner = AugmentedLearner(mixture, beside)
    start = learner.adapter()
    for linear, pair in mixture.adapter(0).weights.items():  # B = 0 beside it
        torch.testing.assert_close(start.weights[linear].A @ start.weights[linear].B, pair.A @ pair.B)
    with torch.no_grad():
        for B in beside.B:
            B.normal_(generator=generator)
    _check_same(learner, 0, side_by_side(mixture.adapter(0), beside.adapter()))
    _check_same(learner, 0, learner.adapter())
    A, B = learner.adapters(torch.tensor([0, 0]), torch.float32)[inventory.linears[0]]
    assert A.shape[0] == B.shape[0] == 2
    assert A.shape[2] == B.shape[1] == inventory.rank + 3
    assert learner.adapter_parameters() == [*beside.A, *beside.B]
    assert learner.routing_parameters() == [mixture.routing]
    assert {p for p in learner.parameters() if p.requires_grad} == {mixture.routing, *beside.A, *beside.B}


def test_the_mu_learner_starts_at_the_mean(inventory: Inventory) -> None:
    _check_same(mean_learner(inventory), 0, mean_adapter(inventory))


def test_a_fixed_learner_is_its_adapter_or_nothing(inventory: Inventory) -> None:
    _check_same(FixedLearner(mean_adapter(inventory)), 0, mean_adapter(inventory))
    assert FixedLearner(None).adapters(torch.tensor([0]), torch.float32) == {}


def test_fresh_skills_change_nothing_and_lie_within_their_bound(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = fresh_skills({"a": (12, 8)}, num_heads=2, num_skills=3, rank=4, generator=generator)
    assert A["a"].shape == (2, 3, 6, 4)
    assert B["a"].shape == (2, 3, 4, 4)
    assert A["a"].abs().max() <= (3 * 12) ** -0.5
    assert A["a"].abs().max() > 0.9 * (3 * 12) ** -0.5
    assert not B["a"].any()
    adapter = fresh_adapter({"a": (12, 8)}, rank=4, alpha=16.0, generator=generator)
    assert adapter.weights["a"].A.shape == (12, 4)
    assert adapter.scaling == 4.0
