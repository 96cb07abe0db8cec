from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.assembly import assemble, mean_adapter, mix
from server.adapters.inventory import Inventory
from server.adapters.routing import one_hot_routing, routing_weights
from server.errors import InvalidInput

MakeInventory = Callable[..., Inventory]
SHAPES = {
    "heads": st.integers(1, 5),
    "skills": st.integers(1, 5),
    "rank": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
}


def naive(A: Tensor, B: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One linear's assembled pair, written out as the paper has it: A (h, K, d_in/h, r), B (h, K, r, d_out/h)."""
    rows, columns = [], []
    for q in range(A.shape[0]):
        rows.append(sum(weights[q, k] * A[q, k] for k in range(A.shape[1])))
        columns.append(sum(weights[q, k] * B[q, k] for k in range(A.shape[1])))
    return torch.cat(rows, dim=0), torch.cat(columns, dim=1)


def random_logits(inventory: Inventory, seed: int) -> Tensor:
    return 3 * torch.randn(inventory.routing_shape, generator=torch.Generator().manual_seed(seed))


@given(**SHAPES)
def test_assembly_is_the_papers_sum_head_by_head(
    make_inventory: MakeInventory, heads: int, skills: int, rank: int, seed: int
) -> None:
    inventory = make_inventory(heads=heads, skills=skills, rank=rank, seed=seed)
    logits = random_logits(inventory, seed)
    adapter = assemble(inventory, logits)
    for row, linear in enumerate(inventory.linears):
        A, B = naive(inventory.A[linear], inventory.B[linear], routing_weights(logits[row]))
        torch.testing.assert_close(adapter.weights[linear].A, A)
        torch.testing.assert_close(adapter.weights[linear].B, B)
    assert tuple(adapter.weights) == inventory.linears


@given(**SHAPES)
def test_zero_routing_is_the_mean_of_the_skills(
    make_inventory: MakeInventory, heads: int, skills: int, rank: int, seed: int
) -> None:
    inventory = make_inventory(heads=heads, skills=skills, rank=rank, seed=seed)
    adapter = mean_adapter(inventory)
    for linear, pair in adapter.weights.items():
        A, B = inventory.A[linear].mean(dim=1), inventory.B[linear].mean(dim=1)
        torch.testing.assert_close(pair.A, torch.cat(list(A), dim=0))
        torch.testing.assert_close(pair.B, torch.cat(list(B), dim=1))


@given(**SHAPES, skill=st.integers(0, 4))
def test_one_hot_routing_is_that_skill_bit_for_bit(
    make_inventory: MakeInventory, heads: int, skills: int, rank: int, seed: int, skill: int
) -> None:
    inventory = make_inventory(heads=heads, skills=skills, rank=rank, seed=seed)
    skill %= skills
    adapter = assemble(inventory, one_hot_routing(len(inventory.linears), heads, skills, skill))
    for linear, pair in adapter.weights.items():
        assert torch.equal(pair.A, torch.cat(list(inventory.A[linear][:, skill]), dim=0))
        assert torch.equal(pair.B, torch.cat(list(inventory.B[linear][:, skill]), dim=1))


@given(skills=SHAPES["skills"], rank=SHAPES["rank"], seed=SHAPES["seed"])
def test_one_head_is_poly(make_inventory: MakeInventory, skills: int, rank: int, seed: int) -> None:
    inventory = make_inventory(heads=1, skills=skills, rank=rank, seed=seed)
    logits = random_logits(inventory, seed)
    adapter = assemble(inventory, logits)
    for row, linear in enumerate(inventory.linears):
        weights = routing_weights(logits[row, 0])
        torch.testing.assert_close(
            adapter.weights[linear].A, torch.einsum("k,kir->ir", weights, inventory.A[linear][0])
        )
        torch.testing.assert_close(
            adapter.weights[linear].B, torch.einsum("k,kro->ro", weights, inventory.B[linear][0])
        )


def test_joining_heads_of_b_keeps_rank_rows_apart(make_inventory: MakeInventory) -> None:
    """Without the transpose of (h, r, d_out/h) the blocks of different heads land in one another's rank rows."""
    inventory = make_inventory(heads=2, skills=1, rank=2, sizes={"q": (2, 4)})
    B = torch.tensor([[[[11.0, 12.0], [21.0, 22.0]]], [[[13.0, 14.0], [23.0, 24.0]]]])  # entry = 10 * rank + column
    adapter = assemble(
        Inventory(A=inventory.A, B={"q": B}, alpha=1.0, backbone_fingerprint="", backbone_name="", prompt_format=""),
        torch.zeros(1, 2, 1),
    )
    assert adapter.weights["q"].B.tolist() == [[11, 12, 13, 14], [21, 22, 23, 24]]


def test_mean_of_the_parts_is_not_the_mean_of_the_products(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(heads=1, skills=2, rank=2, sizes={"q": (4, 4)})
    pair = mean_adapter(inventory).weights["q"]
    products = inventory.A["q"][0] @ inventory.B["q"][0]  # (K, d_in, d_out)
    assert not torch.allclose(pair.A @ pair.B, products.mean(0), atol=1e-2)


def test_tasks_mixed_together_equal_each_alone(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(heads=3, skills=4, rank=2)
    weights = routing_weights(torch.randn(5, *inventory.routing_shape))
    for group in inventory.groups:
        rows = list(group.rows)
        A, B = mix(group.A, group.B, weights[:, rows])
        for task in range(5):
            one_A, one_B = mix(group.A, group.B, weights[task : task + 1, rows])
            torch.testing.assert_close(A[task], one_A[0])
            torch.testing.assert_close(B[task], one_B[0])


def test_half_precision_inventory_is_assembled_in_fp32(make_inventory: MakeInventory) -> None:
    half = Inventory.from_bytes(make_inventory(heads=2, skills=4, rank=2).to_bytes(torch.float16))
    logits = random_logits(half, 0)
    pair = assemble(half, logits.half()).weights["a.q"]
    expected, _ = naive(half.A["a.q"].float(), half.B["a.q"].float(), routing_weights(logits.half().float()[0]))
    assert pair.A.dtype == pair.B.dtype == torch.float32
    torch.testing.assert_close(pair.A, expected)


def test_adapter_knows_its_scaling_and_size(make_inventory: MakeInventory) -> None:
    inventory = make_inventory(heads=2, skills=3, rank=4, alpha=6.0, sizes={"q": (4, 6), "o": (6, 2)})
    adapter = mean_adapter(inventory)
    assert (adapter.alpha, adapter.rank, adapter.scaling) == (6.0, 4, 1.5)
    assert adapter.num_bytes == 4 * 4 * (4 + 6 + 6 + 2) + 4 * 2 * 2 * 3


def test_routing_of_another_shape_is_refused(make_inventory: MakeInventory) -> None:
    inventory = make_inventory()
    with pytest.raises(InvalidInput, match=r"\(3, 3, 2\).*\(3, 2, 3\)"):
        assemble(inventory, torch.zeros(3, 3, 2))
