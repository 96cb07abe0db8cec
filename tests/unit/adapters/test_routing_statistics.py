from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from server.adapters.inventory import Inventory
from server.adapters.routing import one_hot_routing
from server.adapters.routing_statistics import RoutingStatistics, order_by_clustering

MakeInventory = Callable[..., Inventory]


@pytest.fixture
def inventory(make_inventory: MakeInventory) -> Inventory:
    made = make_inventory(skills=3)
    return replace(made, routings={name: torch.randn(made.routing_shape) for name in ("one", "two")})


def _statistics(*routings: torch.Tensor) -> RoutingStatistics:
    weights = torch.stack(routings)
    return RoutingStatistics(tuple(f"t{i}" for i in range(len(weights))), weights)


def _one_hot(*skills: int, num_skills: int = 4) -> torch.Tensor:
    """Weights (L = 1, h, K) of one head per skill named."""
    return torch.nn.functional.one_hot(torch.tensor(skills), num_skills).float()[None]


def test_entropy_goes_from_nothing_to_ln_k() -> None:
    even, sharp = torch.full((2, 3, 4), 0.25), _one_hot(0, 1, 2).expand(2, 3, 4)
    half = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(2, 3, 4)
    statistics = _statistics(even, sharp, half)
    assert statistics.entropies.tolist() == pytest.approx([math.log(4), 0.0, math.log(2)])
    assert statistics.entropy_fractions.tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_the_entropy_of_several_linears_and_heads_is_their_mean() -> None:
    even, sharp = torch.full((1, 2, 4), 0.25), _one_hot(0, 1)
    assert _statistics(torch.cat([even, sharp])).entropies.tolist() == pytest.approx([math.log(4) / 2])


def test_a_single_skill_has_no_choice() -> None:
    statistics = _statistics(torch.ones(2, 1, 1))
    assert statistics.entropies.tolist() == [0.0]
    assert statistics.entropy_fractions.tolist() == [1.0]
    assert torch.isfinite(statistics.similarities).all()


def test_similarity_is_one_for_equal_routings_whatever_their_strength_and_less_for_others() -> None:
    weak, strong = _one_hot(0, 1) * 0.5 + 0.125, _one_hot(0, 1)
    similarities = _statistics(weak, strong, _one_hot(1, 2)).similarities
    assert float(similarities[0, 1]) == pytest.approx(1.0)
    assert float(similarities[0, 2]) == pytest.approx(-1 / 3)
    assert torch.allclose(similarities, similarities.T)


def test_use_is_the_mean_over_tasks() -> None:
    use = _statistics(_one_hot(0, 1), _one_hot(0, 2)).skill_use
    assert use.tolist() == [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]]


def test_similar_tasks_stand_side_by_side() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 20, generator=generator)
    group = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1])
    vectors = torch.nn.functional.normalize(centres[group] + 0.1 * torch.randn(9, 20, generator=generator), dim=1)
    order = order_by_clustering(vectors @ vectors.T)
    assert sorted(order) == list(range(9))
    changes = sum(int(group[a] != group[b]) for a, b in pairwise(order))
    assert changes == 2


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_tasks_have_an_order(count: int) -> None:
    assert sorted(order_by_clustering(torch.eye(count))) == list(range(count))


def test_of_an_inventory(inventory: Inventory) -> None:
    statistics = RoutingStatistics.of(inventory)
    assert statistics is not None
    assert statistics.tasks == tuple(inventory.routings)
    assert torch.allclose(statistics.weights.sum(-1), torch.ones(()))
    document = json.loads(json.dumps(statistics.as_document()))
    assert list(document["tasks"]) == list(inventory.routings)
    assert sum(document["skill_use"]) == pytest.approx(1.0, abs=1e-3)
    assert RoutingStatistics.of(replace(inventory, routings={})) is None


def test_infinite_logits_of_an_imported_lora_are_no_nan(inventory: Inventory) -> None:
    routed = replace(inventory, routings={"one": one_hot_routing(*inventory.routing_shape, skill=1)})
    statistics = RoutingStatistics.of(routed)
    assert statistics is not None
    assert statistics.entropies.tolist() == [0.0]
