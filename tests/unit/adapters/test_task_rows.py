from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.adapters.adapted_linear import AdaptedLinear, AdapterContext
from server.adapters.task_rows import TaskRows

D_IN, D_OUT, RANK = 8, 12, 3


def draw_pair(num_tasks: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(num_tasks, D_IN, RANK, dtype=dtype), torch.randn(num_tasks, RANK, D_OUT, dtype=dtype)
    return A.requires_grad_(), B.requires_grad_()


def frozen(base: nn.Module) -> nn.Module:
    return base.requires_grad_(False)


def merged(base: nn.Module, pair: tuple[Tensor, Tensor], lengths: list[int], x: Tensor) -> Tensor:
    """Every task's rows through a weight with its adapter added: an independent way to the same result."""
    A, B = pair
    parts = x.flatten(0, -2).split(lengths)
    outs = [base(part) + part @ (A[task] @ B[task]) for task, part in enumerate(parts)]
    return torch.cat(outs).view(*x.shape[:-1], -1)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 1000), conv1d=st.booleans())
def test_values_and_gradients_are_those_of_merged_weights(lengths: list[int], seed: int, conv1d: bool) -> None:
    torch.manual_seed(seed)
    base = frozen(Conv1D(D_OUT, D_IN) if conv1d else nn.Linear(D_IN, D_OUT))
    pair = draw_pair(len(lengths))
    x = torch.randn(1, sum(lengths), D_IN, requires_grad=True)
    mix = TaskRows({"q": pair}, lengths)
    ours, expected = mix.forward("q", base, x), merged(base, pair, lengths, x)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    weights = torch.randn(ours.shape)
    inputs = (x, *pair)
    reference = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad((ours * weights).sum(), inputs), reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_gradient_holds_numerically() -> None:
    torch.manual_seed(0)
    base = frozen(nn.Linear(D_IN, D_OUT, dtype=torch.float64))
    A, B = draw_pair(2, torch.float64)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return TaskRows({"q": (A, B)}, [2, 3]).forward("q", base, x)

    assert torch.autograd.gradcheck(run, (x, A, B))


def test_one_adapter_takes_all_rows_whatever_their_tasks() -> None:
    torch.manual_seed(0)
    base, pair, x = frozen(nn.Linear(D_IN, D_OUT)), draw_pair(1), torch.randn(2, 5, D_IN)
    ours = TaskRows({"q": pair}, [3, 7]).forward("q", base, x)
    torch.testing.assert_close(ours, merged(base, pair, [10], x), atol=1e-4, rtol=1e-4)


def test_a_linear_that_it_does_not_adapt_is_bare() -> None:
    context = AdapterContext()
    linear, x = AdaptedLinear(nn.Linear(D_IN, D_OUT), "q", context), torch.randn(1, 4, D_IN)
    with context.use(TaskRows({"another": draw_pair(1)}, [4])):
        assert torch.equal(linear(x), linear.base(x))


@pytest.mark.parametrize("of_inputs", [False, True])
def test_the_frozen_weight_and_inputs_without_gradient_get_none(of_inputs: bool) -> None:
    base, pair = frozen(nn.Linear(D_IN, D_OUT)), draw_pair(1)
    x = torch.randn(4, D_IN, requires_grad=of_inputs)
    TaskRows({"q": pair}, [4]).forward("q", base, x).sum().backward()
    assert base.weight.grad is None
    assert (x.grad is not None) is of_inputs
    assert pair[0].grad is not None


def test_gradients_reach_each_tasks_adapter_and_only_from_its_rows() -> None:
    base, (A, B) = frozen(nn.Linear(D_IN, D_OUT)), draw_pair(3)
    y = TaskRows({"q": (A, B)}, [2, 1, 2]).forward("q", base, torch.randn(5, D_IN))
    y[:2].sum().backward()  # rows of task 0
    for grad in (A.grad, B.grad):
        assert grad is not None
        assert grad[0].abs().sum() > 0
        assert grad[1:].abs().sum() == 0
