"""The operator over an inventory's skills against the adapters that are assembled of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.adapters.assembly import assemble
from server.adapters.inventory import Inventory
from server.adapters.routing import routing_weights
from server.adapters.skill_operator import SkillOperator, SkillTiles, fits_tiles
from server.adapters.slot_operator import NO_SLOT
from server.native.library import load_library
from tests.unit.adapters.conftest import MakeInventory

LIBRARY = load_library()
needs_tiles = pytest.mark.skipif(
    LIBRARY is None or not LIBRARY.has_tiles, reason="the operators were not built or the processor has no matrix tiles"
)


def in_bf16(inventory: Inventory) -> Inventory:
    return replace(
        inventory,
        A={linear: A.bfloat16() for linear, A in inventory.A.items()},
        B={linear: B.bfloat16() for linear, B in inventory.B.items()},
    )


def add(inventory: Inventory, linears: list[str], routings: Tensor, x: Tensor, y: Tensor, slots: Tensor) -> None:
    """By the operator, to y (N, D)."""
    assert LIBRARY is not None
    operator, tiles, weights = SkillOperator(LIBRARY), SkillTiles(inventory), routing_weights(routings)
    sizes = inventory.linear_sizes
    skills = tiles.describe({linear: sizes[linear][1] for linear in linears}, weights)
    assert skills is not None
    operator.add_rows(skills, x, y, slots, operator.room(skills), threads=torch.get_num_threads())


def expected(inventory: Inventory, linears: list[str], routings: Tensor, x: Tensor, y: Tensor, slots: Tensor) -> Tensor:
    """One row at a time, in fp64."""
    adapters = [assemble(inventory, routing) for routing in routings]
    rows = y.double()
    for row, slot in enumerate(slots.tolist()):
        column = 0
        for linear in linears:
            pair, width = adapters[slot].weights[linear], inventory.linear_sizes[linear][1]
            if slot != NO_SLOT:
                added = inventory.scaling * (x[row].double() @ pair.A.double()) @ pair.B.double()
                rows[row, column : column + width] += added
            column += width
    return rows


@needs_tiles
def test_rows_get_what_their_assembled_adapters_make(make_inventory: MakeInventory) -> None:
    choose = random.Random(0)
    for seed in range(30):
        heads, rank = choose.randint(1, 9), choose.choice([1, 2, 4, 8, 16])
        skills = choose.randint(1, 16)
        d_in, outs = heads * choose.randint(1, 70), [heads * choose.randint(1, 70) for _ in range(choose.randint(1, 3))]
        sizes = {f"linear-{n}": (d_in, d_out) for n, d_out in enumerate(outs)}
        inventory = in_bf16(make_inventory(heads=heads, skills=skills, rank=rank, sizes=sizes, alpha=2.0, seed=seed))
        num_slots, rows = choose.randint(1, 20), choose.randint(1, 70)
        routings = 3 * torch.randn(num_slots, *inventory.routing_shape)
        slots = torch.tensor([choose.randint(NO_SLOT, num_slots - 1) for _ in range(rows)])
        x = torch.randn(rows + choose.randint(0, 2), d_in)
        y = torch.randn(len(x), sum(outs) + 3)
        truth = expected(inventory, list(sizes), routings, x, y, slots)
        before = y.clone()
        add(inventory, list(sizes), routings, x, y, slots)
        scale = (truth - before.double()).abs().max().item()
        torch.testing.assert_close(y.double(), truth, rtol=1e-6, atol=1e-5 * max(scale, 1.0))
        alone = [*(slots == NO_SLOT).nonzero().flatten().tolist(), *range(rows, len(x))]
        assert torch.equal(y[alone], before[alone])
        assert torch.equal(y[:, sum(outs) :], before[:, sum(outs) :])


@needs_tiles
def test_a_rows_numbers_do_not_depend_on_the_batch_or_the_threads(make_inventory: MakeInventory) -> None:
    inventory = in_bf16(make_inventory(heads=3, skills=5, rank=4, sizes={"q": (99, 60), "v": (99, 30)}))
    routings = torch.randn(40, *inventory.routing_shape)
    x, y, slots = torch.randn(40, 99), torch.randn(40, 90), torch.arange(40)
    together = y.clone()
    add(inventory, ["q", "v"], routings, x, together, slots)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        for row in range(40):
            own = y[row : row + 1].clone()
            add(inventory, ["q", "v"], routings, x[row : row + 1].contiguous(), own, slots[row : row + 1].contiguous())
            assert torch.equal(own[0], together[row])
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_linears_that_the_inventory_lacks_are_left_alone(make_inventory: MakeInventory) -> None:
    assert LIBRARY is not None
    inventory = in_bf16(make_inventory(heads=2, skills=3, rank=2, sizes={"v": (8, 6)}))
    tiles, weights = SkillTiles(inventory), torch.full((1, *inventory.routing_shape), 1 / 3)
    assert tiles.describe({"q": 4, "k": 2}, weights) is None
    skills = tiles.describe({"q": 4, "v": 6, "k": 2}, weights)
    assert skills is not None
    operator = SkillOperator(LIBRARY)
    x, y = torch.randn(1, 8), torch.zeros(1, 12)
    operator.add_rows(skills, x, y, torch.tensor([0]), operator.room(skills), threads=1)
    assert y[0, 4:10].all()
    assert not y[0, :4].any()
    assert not y[0, 10:].any()


def test_only_suitable_inventories_go_into_tiles(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(heads=2, skills=4, rank=4)
    assert fits_tiles(in_bf16(inventory))
    assert not fits_tiles(inventory)
    one_left = in_bf16(inventory)
    assert not fits_tiles(replace(one_left, B={**one_left.B, "a.q": inventory.B["a.q"]}))
    for unsuitable in ({"rank": 3}, {"rank": 32}, {"skills": 17}, {"sizes": {"q": (2050, 2)}}):
        assert not fits_tiles(in_bf16(make_inventory(**{"heads": 2, "skills": 4, "rank": 4} | unsuitable)))
    with pytest.raises(ValueError, match="do not suit"):
        SkillTiles(inventory)
