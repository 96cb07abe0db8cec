"""The compiled operator against torch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from server.adapters.slot_operator import NO_SLOT, TABLE_DTYPES, GroupTables, LinearTables, SlotOperator, describe
from tests.unit.native.libraries import INSTRUCTIONS, LIBRARIES

each_operator = pytest.mark.parametrize("operator", [SlotOperator(library) for library in LIBRARIES], ids=INSTRUCTIONS)


def tables_of(*linears: LinearTables) -> GroupTables:
    return (LinearTables * len(linears))(*linears)


def add(operator: SlotOperator, tables: GroupTables, x: Tensor, y: Tensor, slots: Tensor, threads: int = 2) -> None:
    room = torch.empty(threads, 4, max(table.rank for table in tables))
    operator.add_rows(tables, x, y, slots, room, threads)


@each_operator
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_get_what_torch_computes(operator: SlotOperator, dtype: torch.dtype, threads: int) -> None:
    choose = random.Random(threads)
    for _ in range(60):
        d_in, outs = choose.randint(1, 150), [choose.randint(1, 150) for _ in range(choose.randint(1, 3))]
        num_slots, rank, rows = choose.randint(1, 6), choose.randint(1, 20), choose.randint(1, 12)
        A = torch.randn(num_slots, rank * len(outs), d_in).to(dtype)
        Bs = [torch.randn(num_slots, rank, d_out).to(dtype) for d_out in outs]
        slots = torch.tensor([choose.randrange(num_slots) for _ in range(rows)])
        if choose.random() < 0.5:
            slots = slots.sort().values  # rows that lie together go through their tables together
        x = torch.randn(rows + choose.randint(0, 2), d_in)
        y = torch.randn(len(x), sum(outs) + 3)
        expected, linears, column = y.clone(), [], 0
        for place, B in enumerate(Bs):
            own_A = A[:, place * rank : (place + 1) * rank]
            for row, slot in enumerate(slots):
                expected[row, column : column + B.shape[2]] += (x[row] @ own_A[slot].float().T) @ B[slot].float()
            linears.append(describe(A, B, place * rank, column))
            column += B.shape[2]
        add(operator, tables_of(*linears), x, y, slots, threads)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(y[rows:], expected[rows:])
        assert torch.equal(y[:, column:], expected[:, column:])


@each_operator
def test_no_rows_are_no_work(operator: SlotOperator) -> None:
    A = B = torch.ones(1, 1, 4)
    x, y = torch.ones(2, 4), torch.zeros(2, 4)
    add(operator, tables_of(describe(A, B, 0, 0)), x, y, torch.empty(0, dtype=torch.int64))
    assert not y.any()


@each_operator
def test_rows_without_a_slot_are_left_alone(operator: SlotOperator) -> None:
    A, B = torch.randn(2, 3, 20), torch.randn(2, 3, 30)
    x, y = torch.randn(5, 20), torch.randn(5, 30)
    before = y.clone()
    slots = torch.tensor([1, NO_SLOT, NO_SLOT, 0, NO_SLOT])
    add(operator, tables_of(describe(A, B, 0, 0)), x, y, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot == NO_SLOT:
            assert torch.equal(y[row], before[row])
        else:
            torch.testing.assert_close(y[row], before[row] + (x[row] @ A[slot].T) @ B[slot])


@each_operator
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_a_rows_numbers_do_not_depend_on_the_batch_or_the_threads(operator: SlotOperator, dtype: torch.dtype) -> None:
    A, B = torch.randn(4, 5, 70).to(dtype), torch.randn(4, 5, 90).to(dtype)
    tables = tables_of(describe(A, B, 0, 0))
    x, y = torch.randn(11, 70), torch.randn(11, 90)
    slots = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3])

    def added(rows: slice, threads: int) -> Tensor:
        part, out = x[rows].contiguous(), y[rows].contiguous()
        add(operator, tables, part, out, slots[rows].contiguous(), threads)
        return out

    together = added(slice(0, 11), 1)
    assert torch.equal(together, added(slice(0, 11), 4))
    for row in range(11):
        assert torch.equal(together[row], added(slice(row, row + 1), 1)[0])


@each_operator
def test_every_fp16_number_is_read_as_it_is(operator: SlotOperator) -> None:
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    A = torch.ones(1, 1, 1, dtype=torch.float16)
    tables = tables_of(describe(A, numbers.view(1, 1, -1), 0, 0))
    y = torch.zeros(1, len(numbers))
    add(operator, tables, torch.ones(1, 1), y, torch.zeros(1, dtype=torch.int64), threads=1)
    assert torch.equal(y[0].nan_to_num(nan=-1.0), numbers.float().nan_to_num(nan=-1.0))
