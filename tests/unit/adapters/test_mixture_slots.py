"""Which rows are computed from an inventory's skills."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from server.adapters.assembly import Adapter, assemble
from server.adapters.inventory import Inventory
from server.adapters.mixture_slots import MixtureSlots
from server.adapters.skill_operator import SkillOperator
from server.adapters.slot_operator import NO_SLOT
from tests.unit.adapters.conftest import MakeInventory
from tests.unit.adapters.test_skill_operator import in_bf16

SIZES = {"a.q": (4, 6), "b.q": (4, 6), "a.o": (6, 2)}


@pytest.fixture
def mixtures() -> MixtureSlots:
    """Needs two of an inventory; nothing is computed here."""
    return MixtureSlots(cast(SkillOperator, None), SIZES, num_slots=6, least=2)


@pytest.fixture
def inventories(make_inventory: MakeInventory) -> list[Inventory]:
    return [in_bf16(make_inventory(sizes=SIZES, seed=seed)) for seed in range(2)]


def adapter(inventory: Inventory) -> Adapter:
    return assemble(inventory, torch.randn(inventory.routing_shape))


def chosen(mixtures: MixtureSlots, *slots: int) -> tuple[int, ...] | None:
    rows = mixtures.choose(slots)
    return None if rows is None else rows.slots


def test_enough_different_mixtures_of_one_inventory_are_chosen(
    mixtures: MixtureSlots, inventories: list[Inventory]
) -> None:
    for slot, owner in enumerate([0, 0, 1, 1, 1]):
        mixtures.load(slot, adapter(inventories[owner]).mixture)
    mixtures.load(5, None)
    assert chosen(mixtures) is None
    assert chosen(mixtures, 5, 5) is None
    assert chosen(mixtures, 0, 0, 0) is None
    assert chosen(mixtures, 0, 2, 5) is None
    assert chosen(mixtures, 0, 0, 1) == (0, 0, 1)
    assert chosen(mixtures, 0, 1, 2, 3, 4, 5) == (NO_SLOT, NO_SLOT, 2, 3, 4, NO_SLOT)
    assert chosen(mixtures, 0, 1, 2, 2, 2) == (0, 1, NO_SLOT, NO_SLOT, NO_SLOT)


def test_a_slot_is_what_was_loaded_last(mixtures: MixtureSlots, inventories: list[Inventory]) -> None:
    for slot in (0, 1):
        mixtures.load(slot, adapter(inventories[0]).mixture)
    mixtures.load(1, None)
    assert chosen(mixtures, 0, 1) is None
    mixtures.load(1, adapter(inventories[1]).mixture)
    assert chosen(mixtures, 0, 1) is None
    mixtures.load(0, adapter(inventories[1]).mixture)
    assert chosen(mixtures, 0, 1) == (0, 1)


def test_inventories_that_do_not_suit_are_left_to_slots(mixtures: MixtureSlots, make_inventory: MakeInventory) -> None:
    inventory = make_inventory(sizes=SIZES)
    for slot in (0, 1):
        mixtures.load(slot, adapter(inventory).mixture)
    assert chosen(mixtures, 0, 1) is None


def test_an_inventory_leaves_when_no_slot_needs_it(mixtures: MixtureSlots, inventories: list[Inventory]) -> None:
    mixtures.load(0, adapter(inventories[0]).mixture)
    mixtures.load(1, adapter(inventories[1]).mixture)
    assert mixtures.num_inventories == 2
    mixtures.load(0, None)
    assert mixtures.num_inventories == 2, "it may come back soon"
    other = in_bf16(inventories[0])
    mixtures.load(0, adapter(other).mixture)
    assert mixtures.num_inventories == 2
    mixtures.load(2, adapter(other).mixture)
    assert mixtures.num_inventories == 2
