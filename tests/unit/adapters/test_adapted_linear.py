from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.adapters.adapted_linear import AdaptedLinear, AdapterContext, TaskRows

ROWS, LENGTH, D_IN, D_OUT, RANK = 6, 5, 8, 12, 3


def task_rows(num_tasks: int, rows: list[int], linear: str = "q") -> TaskRows:
    A = torch.randn(num_tasks, D_IN, RANK)
    B = torch.randn(num_tasks, RANK, D_OUT)
    return TaskRows({linear: (A, B)}, torch.tensor(rows))


def make(base: nn.Module | None = None) -> tuple[AdaptedLinear, AdapterContext]:
    context = AdapterContext()
    return AdaptedLinear(base or nn.Linear(D_IN, D_OUT), "q", context), context


def alone(mix: TaskRows, base: nn.Module, x: Tensor, row: int) -> Tensor:
    """Row `row` computed by itself with a merged weight: an independent way to the same result."""
    A, B = mix.adapters["q"]
    task = int(mix.rows[row])
    return base(x[row]) + x[row] @ (A[task] @ B[task])


@given(rows=st.lists(st.integers(0, 3), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_every_row_of_a_mixed_batch_gets_its_own_tasks_adapter(rows: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    linear, context = make()
    mix, x = task_rows(4, rows), torch.randn(len(rows), LENGTH, D_IN)
    with context.use(mix):
        y = linear(x)
    for row in range(len(rows)):
        torch.testing.assert_close(y[row], alone(mix, linear.base, x, row), atol=1e-4, rtol=1e-4)


def test_conv1d_is_adapted_like_a_linear() -> None:
    base = Conv1D(D_OUT, D_IN)
    linear, context = make(base)
    mix, x = task_rows(2, [1, 0, 1]), torch.randn(3, LENGTH, D_IN)
    with context.use(mix):
        y = linear(x)
    for row in range(3):
        torch.testing.assert_close(y[row], alone(mix, base, x, row), atol=1e-4, rtol=1e-4)
    assert linear.weight is base.weight


def test_single_task_takes_all_rows() -> None:
    linear, context = make()
    mix, x = task_rows(1, [0, 0]), torch.randn(2, LENGTH, D_IN)
    with context.use(mix):
        y = linear(x)
    for row in range(2):
        torch.testing.assert_close(y[row], alone(mix, linear.base, x, row), atol=1e-4, rtol=1e-4)


def test_without_a_mix_it_is_the_bare_linear() -> None:
    linear, context = make()
    x = torch.randn(2, LENGTH, D_IN)
    assert torch.equal(linear(x), linear.base(x))
    with context.use(None):
        assert torch.equal(linear(x), linear.base(x))


def test_linear_that_the_mix_does_not_adapt_is_bare() -> None:
    linear, context = make()
    x = torch.randn(2, LENGTH, D_IN)
    with context.use(task_rows(1, [0, 0], linear="another")):
        assert torch.equal(linear(x), linear.base(x))


def test_mixes_nest_and_end_with_their_block_also_after_an_error() -> None:
    context = AdapterContext()
    outer, inner = task_rows(1, [0]), task_rows(1, [0])
    with context.use(outer):
        try:
            with context.use(inner):
                assert context.mix is inner
                raise RuntimeError
        except RuntimeError:
            pass
        assert context.mix is outer
    assert context.mix is None


def test_gradients_reach_each_tasks_adapter_and_only_from_its_rows() -> None:
    linear, context = make()
    linear.base.requires_grad_(False)
    A = torch.randn(3, D_IN, RANK, requires_grad=True)
    B = torch.randn(3, RANK, D_OUT, requires_grad=True)
    x = torch.randn(2, LENGTH, D_IN)
    with context.use(TaskRows({"q": (A, B)}, torch.tensor([2, 0]))):
        y = linear(x)
    y[0].sum().backward()  # a row of task 2
    for grad in (A.grad, B.grad):
        assert grad is not None
        assert grad[2].abs().sum() > 0
        assert grad[0].abs().sum() == 0
        assert grad[1].abs().sum() == 0
