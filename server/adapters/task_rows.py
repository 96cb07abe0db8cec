"""The mix of a training batch: rows sorted by task, every task's rows with its own adapter.

Letters: S rows (tokens) of a batch, N tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


class TaskRows:
    """An AdapterMix: rows sorted by task and each task's adapter, differentiable in inputs and adapters, once.

    Every row meets all N adapters side by side and a mask keeps its own. These few wide products cost no more
    than narrow ones per task, which wait for memory: measured for 768 rows of 6 tasks, all 7 linears of a layer
    of SmolLM2, rank 4, one core, on top of the bare linears' 37 ms in fp32 and 5.7 ms in bf16: 5.8 and 3.3 ms
    against 4.0 and 5.7 ms.
    """

    def __init__(self, adapters: Mapping[str, tuple[Tensor, Tensor]], lengths: Sequence[int]) -> None:
        """`adapters` {linear: A (N, d_in, r), B (N, r, d_out)}, scaling folded in; task n has the next lengths[n]
        rows. A single adapter (N = 1) is for all rows, whatever `lengths` says.
        """
        self.adapters = adapters
        self.lengths = lengths
        self._own: dict[tuple[int, int], Tensor] = {}  # masks by N and rank, shared by the linears

    def forward(self, linear: str, base: nn.Module, x: Tensor) -> Tensor:
        pair = self.adapters.get(linear)
        if pair is None:
            y: Tensor = base(x)
            return y
        A, B = pair
        num_tasks, d_in, rank = A.shape
        own = self._mask(num_tasks, rank, x) if num_tasks > 1 else None
        weight, bias = _weight_and_bias(base)
        wide_A, wide_B = A.transpose(0, 1).reshape(d_in, -1), B.flatten(0, 1)  # (d_in, N * r), (N * r, d_out)
        rows = x.flatten(0, -2)
        out: Tensor = _AdaptedProduct.apply(rows, weight, bias, wide_A, wide_B, own)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    def _mask(self, num_tasks: int, rank: int, x: Tensor) -> Tensor:
        """(S, N * r): one where a row meets its own task's adapter, else zero."""
        key = (num_tasks, rank)
        if key not in self._own:
            tasks = torch.arange(num_tasks, device=x.device)
            row_task = tasks.repeat_interleave(
                torch.tensor(self.lengths, device=x.device), output_size=sum(self.lengths)
            )
            self._own[key] = (row_task[:, None] == tasks.repeat_interleave(rank)).to(x.dtype)
        return self._own[key]


class _AdaptedProduct(torch.autograd.Function):
    """y = x W^T + b + ((x A) * own) B, with W frozen.

    One function, so that the low-rank parts add in place to what the backbone's products made, forward and
    back; plain autograd would write, keep and add further tensors of the size of x and y.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, own: Tensor | None
    ) -> Tensor:
        """x (S, d_in), weight (d_out, d_in), bias (d_out,), A (d_in, R), B (R, d_out), own (S, R) -> (S, d_out)."""
        # As a linear's product, with A's long side along memory: three times as fast as x @ A in fp32 at rank 4.
        hidden = F.linear(x, A.t().contiguous())
        if own is not None:
            hidden *= own
        ctx.save_for_backward(x, hidden, weight, A, B, own)
        return F.linear(x, weight, bias).addmm_(hidden, B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight, A, B, own = ctx.saved_tensors
        grad_hidden = grad @ B.t()
        if own is not None:
            grad_hidden *= own
        grad_x = (grad @ weight).addmm_(grad_hidden, A.t()) if ctx.needs_input_grad[0] else None
        # The transposed product, as its long side then lies along memory: three times as fast.
        grad_A = (grad_hidden.t() @ x).t() if ctx.needs_input_grad[3] else None
        grad_B = hidden.t() @ grad if ctx.needs_input_grad[4] else None
        return grad_x, None, None, grad_A, grad_B, None


def _weight_and_bias(base: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a frozen linear, the weight as (d_out, d_in)."""
    if isinstance(base, Conv1D):
        return base.weight.t(), base.bias
    assert isinstance(base, nn.Linear)
    return base.weight, base.bias
