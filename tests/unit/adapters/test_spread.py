from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.inventory import Inventory
from server.adapters.routing import one_hot_routing
from server.adapters.routing_statistics import RoutingStatistics
from server.adapters.spread import scale_departures, spread_skills
from server.errors import InvalidInput

MakeInventory = Callable[..., Inventory]


@pytest.fixture
def inventory(make_inventory: MakeInventory) -> Inventory:
    """With a task of random routing, and one that uses skill 1 alone."""
    made = make_inventory(heads=2, skills=4, rank=3)
    routings = {
        "any": 3 * torch.randn(made.routing_shape, generator=torch.Generator().manual_seed(1)),
        "one": one_hot_routing(*made.routing_shape, skill=1),
    }
    return replace(made, routings=routings)


def _assert_equal(one: Adapter, other: Adapter) -> None:
    for linear, pair in one.weights.items():
        torch.testing.assert_close(other.weights[linear].A, pair.A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other.weights[linear].B, pair.B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0, 50.0])
def test_every_task_and_the_mean_keep_their_adapter(inventory: Inventory, factor: float) -> None:
    apart = spread_skills(inventory, factor)
    _assert_equal(mean_adapter(inventory), mean_adapter(apart))
    for task, routing in inventory.routings.items():
        _assert_equal(assemble(inventory, routing), assemble(apart, apart.routings[task]))


def test_a_file_keeps_the_tasks_adapters_as_exactly_as_its_numbers(inventory: Inventory) -> None:
    apart = spread_skills(inventory, 8.0)
    read = Inventory.from_bytes(apart.to_bytes())
    assert read.spread == 8.0
    for task in inventory.routings:
        expected, got = assemble(inventory, inventory.routings[task]), assemble(read, read.routings[task])
        for linear, pair in expected.weights.items():
            # bf16 keeps 8 bits of skills that are now up to 8 times as large.
            assert (got.weights[linear].A - pair.A).abs().max() < 8 * 2**-8 * inventory.A[linear].abs().max()


def test_routing_then_reaches_beyond_the_skills(inventory: Inventory) -> None:
    """Twice skill 1 less the mean lies outside of all mixtures; moved apart, a mixture makes it."""
    apart = spread_skills(inventory, 8.0)
    beyond = {n: 2 * A[:, 1] - A.mean(1) for n, A in inventory.A.items()}  # (h, d_in/h, r)
    weights = torch.full(inventory.routing_shape, 1 / 4 - 2 / 8 / 4)
    weights[..., 1] = 1 / 4 + 2 / 8 * 3 / 4
    logits = torch.logit(weights)
    for linear, pair in assemble(apart, logits).weights.items():
        torch.testing.assert_close(pair.A, beyond[linear].flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_twice_is_the_product_of_the_factors(inventory: Inventory) -> None:
    assert spread_skills(spread_skills(inventory, 2.0), 3.0).spread == 6.0


def test_statistics_are_of_the_scale_departures(inventory: Inventory) -> None:
    before, after = RoutingStatistics.of(inventory), RoutingStatistics.of(spread_skills(inventory, 8.0))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after.weights, before.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.entropies, before.entropies, rtol=1e-3, atol=1e-4)


def test_statistics_of_a_file_are_numbers_although_its_routings_are_rounded(inventory: Inventory) -> None:
    read = Inventory.from_bytes(spread_skills(inventory, 8.0).to_bytes())
    before, after = RoutingStatistics.of(inventory), RoutingStatistics.of(read)
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after.entropies, before.entropies, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("spread", [0.0, 0.5, -1.0, math.inf, math.nan])
def test_an_impossible_spread_is_refused(inventory: Inventory, spread: float) -> None:
    with pytest.raises(InvalidInput, match="spread is a number of at least 1"):
        replace(inventory, spread=spread)


def test_departures_from_even_weights_grow_and_the_sum_stays() -> None:
    assert scale_departures(torch.tensor([0.5, 0.25, 0.25, 0.0]), 2.0).tolist() == [0.75, 0.25, 0.25, -0.25]
