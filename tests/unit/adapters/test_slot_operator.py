"""The compiled operator against torch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from server.adapters.slot_operator import NO_SLOT, TABLE_DTYPES, SlotOperator
from tests.unit.native.libraries import INSTRUCTIONS, LIBRARIES

each_operator = pytest.mark.parametrize("operator", [SlotOperator(library) for library in LIBRARIES], ids=INSTRUCTIONS)


@each_operator
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_get_what_torch_computes(operator: SlotOperator, dtype: torch.dtype, threads: int) -> None:
    choose = random.Random(threads)
    for _ in range(60):
        d_in, outs = choose.randint(1, 150), [choose.randint(1, 150) for _ in range(choose.randint(1, 3))]
        num_slots, rank, rows = choose.randint(1, 6), choose.randint(1, 20), choose.randint(1, 12)
        A = torch.randn(num_slots, rank * len(outs), d_in).to(dtype)
        slots = torch.tensor([choose.randrange(num_slots) for _ in range(rows)])
        x = torch.randn(1, rows + choose.randint(0, 2), d_in)
        hidden = torch.empty(rows, rank * len(outs))
        for place, d_out in enumerate(outs):
            B = torch.randn(num_slots, rank, d_out).to(dtype)
            y = torch.randn(1, x.shape[1], d_out)
            expected = y.clone()
            own_A = A[:, place * rank : (place + 1) * rank]
            for row, slot in enumerate(slots):
                expected[0, row] += (x[0, row] @ own_A[slot].float().T) @ B[slot].float()
            tables = operator.describe(A, B, place * rank)
            operator.add_rows(tables, x, y, hidden, place > 0, slots, threads)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(y[0, rows:], expected[0, rows:])


@each_operator
def test_no_rows_are_no_work(operator: SlotOperator) -> None:
    A = B = torch.ones(1, 1, 4)
    tables = operator.describe(A, B, 0)
    y = torch.zeros(1, 0, 4)
    operator.add_rows(tables, y, y, torch.empty(0, 1), False, torch.empty(0, dtype=torch.int64), 2)


@each_operator
def test_rows_without_a_slot_are_left_alone(operator: SlotOperator) -> None:
    A, B = torch.randn(2, 3, 20), torch.randn(2, 3, 30)
    x, y = torch.randn(1, 5, 20), torch.randn(1, 5, 30)
    before = y.clone()
    slots = torch.tensor([1, NO_SLOT, NO_SLOT, 0, NO_SLOT])
    operator.add_rows(operator.describe(A, B, 0), x, y, torch.empty(5, 3), False, slots, 2)
    for row, slot in enumerate(slots.tolist()):
        added = 0 if slot == NO_SLOT else (x[0, row] @ A[slot].T) @ B[slot]
        torch.testing.assert_close(y[0, row], before[0, row] + added)


@each_operator
def test_a_rows_numbers_do_not_depend_on_the_batch_or_the_threads(operator: SlotOperator) -> None:
    A, B = torch.randn(4, 5, 70), torch.randn(4, 5, 90)
    tables = operator.describe(A, B, 0)
    x, y = torch.randn(1, 9, 70), torch.randn(1, 9, 90)
    slots = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3])

    def add(rows: slice, threads: int) -> Tensor:
        part, out = x[:, rows].contiguous(), y[:, rows].contiguous()
        own = slots[rows].contiguous()
        operator.add_rows(tables, part, out, torch.empty(len(own), 5), False, own, threads)
        return out[0]

    together = add(slice(0, 9), 1)
    assert torch.equal(together, add(slice(0, 9), 4))
    for row in range(9):
        assert torch.equal(together[row], add(slice(row, row + 1), 1)[0])


@each_operator
def test_every_fp16_number_is_read_as_it_is(operator: SlotOperator) -> None:
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    A = torch.ones(1, 1, 1, dtype=torch.float16)
    tables = operator.describe(A, numbers.view(1, 1, -1), 0)
    y = torch.zeros(1, 1, len(numbers))
    slots = torch.zeros(1, dtype=torch.int64)
    operator.add_rows(tables, torch.ones(1, 1, 1), y, torch.empty(1, 1), False, slots, 1)
    assert torch.equal(y[0, 0].nan_to_num(nan=-1.0), numbers.float().nan_to_num(nan=-1.0))
