from __future__ import annotations

import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.training.learners import (
    FixedLearner,
    Learner,
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
