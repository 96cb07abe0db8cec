"""A frozen linear whose output every row's own adapter adds to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class AdapterMix(Protocol):
    """The adapters of one forward pass: which rows belong to which task, and what each task adds."""

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (..., d_out) plus what the rows' adapters make of x (..., d_in); y may be changed in place."""
        ...


class AdapterContext:
    """Shared by all adapted linears of one model: the mix in force during a forward pass."""

    def __init__(self) -> None:
        self.mix: AdapterMix | None = None

    @contextmanager
    def use(self, mix: AdapterMix | None) -> Iterator[None]:
        """Put `mix` in force; None is the bare backbone."""
        previous, self.mix = self.mix, mix
        try:
            yield
        finally:
            self.mix = previous


class AdaptedLinear(nn.Module):
    """Wraps a frozen linear (nn.Linear or GPT-2's Conv1D) named `linear`; bare when no mix is in force."""

    def __init__(self, base: nn.Module, linear: str, context: AdapterContext) -> None:
        super().__init__()
        self.base = base
        self.linear = linear
        self.context = context

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a linear for its device or dtype."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        mix = self.context.mix
        return y if mix is None else mix.add(self.linear, x, y)


@dataclass(frozen=True)
class TaskRows:
    """The mix of a padded batch (B, T): N tasks' adapters and, for every sequence, which one is its own.

    Differentiable in the adapters, so training uses it. Every row meets all N adapters side by side and a
    mask keeps its own: two matrix products, where gathering one adapter per row would copy each of them,
    and scatter as many gradients on the way back.
    """

    adapters: Mapping[str, tuple[Tensor, Tensor]]  # linear -> A (N, d_in, r), B (N, r, d_out), scaling folded in
    rows: Tensor  # (B,) indices into N

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (B, T, d_out) + (x A_n) B_n for every sequence's own n, with x (B, T, d_in)."""
        pair = self.adapters.get(linear)
        if pair is None:
            return y
        A, B = pair
        num_tasks, d_in, rank = A.shape
        hidden = x @ A.transpose(0, 1).reshape(d_in, num_tasks * rank)  # (B, T, N * r)
        if num_tasks > 1:
            hidden = hidden * self._own(num_tasks, rank, hidden.dtype)
        wide = torch.addmm(y.flatten(0, 1), hidden.flatten(0, 1), B.reshape(num_tasks * rank, -1))
        return wide.view_as(y)

    def _own(self, num_tasks: int, rank: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, N * r): one where a sequence meets its own task's adapter, else zero."""
        one_hot = nn.functional.one_hot(self.rows, num_tasks).to(dtype)
        return one_hot.repeat_interleave(rank, dim=1)[:, None]
