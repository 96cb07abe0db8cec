"""A frozen linear whose output every row's own adapter adds to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class AdapterMix(Protocol):
    """The adapters of one forward pass: which rows belong to which task, and what each task adds."""

    def forward(self, linear: str, base: nn.Module, x: Tensor) -> Tensor:
        """base(x) (..., d_out) plus what the rows' adapters make of x (..., d_in)."""
        ...


class AddedMix(ABC):
    """An AdapterMix that adds to what the frozen linear made."""

    def forward(self, linear: str, base: nn.Module, x: Tensor) -> Tensor:
        return self.add(linear, x, base(x))

    @abstractmethod
    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (..., d_out) plus what the rows' adapters make of x (..., d_in); y may be changed in place."""


class AdapterContext(threading.local):
    """Shared by all adapted linears of one model: the mix in force during a forward pass, each thread's its own."""

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

    @property
    def out_features(self) -> int:
        """d_out."""
        features = self.base.nf if isinstance(self.base, Conv1D) else self.base.out_features
        assert isinstance(features, int)
        return features

    def forward(self, x: Tensor) -> Tensor:
        mix = self.context.mix
        if mix is None:
            y: Tensor = self.base(x)
            return y
        return mix.forward(self.linear, self.base, x)
