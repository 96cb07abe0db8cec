"""Linears that read the same input, computed as one, each row's adapter included.

Letters: N rows, d_in and d_out of one linear, D the sum of d_out over the group's linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from server.adapters.adapted_linear import AdaptedLinear
from server.adapters.operator_mix import OperatorMix
from server.engine.int8_linear import Int8Linear
from server.engine.merged import MergedMix

_NO_WEIGHTS: Mapping[str, Tensor] = {}


class LinearGroup:
    """Adapted linears by name that follow each other on one input; the bases are in fp32 or 8 bits, on CPU."""

    def __init__(self, linears: Sequence[AdaptedLinear]) -> None:
        self._names = tuple(adapted.linear for adapted in linears)
        bases = [adapted.base for adapted in linears]
        self._product = _product(self._names, bases)
        self._biases = _side_by_side(linears)

    def __call__(self, x: Tensor, mix: OperatorMix | MergedMix | None) -> Tensor:
        """x (N, d_in) -> the linears' outputs side by side (N, D)."""
        y = self._product(x, mix.weights if isinstance(mix, MergedMix) else _NO_WEIGHTS)
        if self._biases is not None:
            y += self._biases
        if isinstance(mix, OperatorMix):
            mix.add_group(self._names, x, y)
        return y


class _Product(Protocol):
    def __call__(self, x: Tensor, merged: Mapping[str, Tensor]) -> Tensor:
        """x (N, d_in) -> (N, D) without biases; `merged` weights stand in for the linears' own."""
        ...


class _PlainProduct:
    """Each linear's product, written where it belongs."""

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Linear]) -> None:
        self._weights = {name: linear.weight.detach() for name, linear in zip(names, linears, strict=True)}
        self._width = sum(linear.out_features for linear in linears)

    def __call__(self, x: Tensor, merged: Mapping[str, Tensor]) -> Tensor:
        y = x.new_empty(len(x), self._width)
        start = 0
        for name, own in self._weights.items():
            weight = merged.get(name, own)
            torch.mm(x, weight.T, out=y[:, start : start + len(weight)])
            start += len(weight)
        return y


class _Int8Product:
    """One product of all linears, whose weights lie below each other already."""

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        self._shared = linears[0].shared
        assert all(linear.shared is self._shared for linear in linears), "these linears were not quantised together"

    def __call__(self, x: Tensor, merged: Mapping[str, Tensor]) -> Tensor:
        assert not merged, "8-bit weights have no merged copies"
        return self._shared.product(x)


def _product(names: Sequence[str], bases: Sequence[nn.Module]) -> _Product:
    if all(isinstance(base, Int8Linear) for base in bases):
        return _Int8Product([base for base in bases if isinstance(base, Int8Linear)])
    assert all(type(base) is nn.Linear for base in bases), "these linears cannot be computed as one"
    return _PlainProduct(names, [base for base in bases if isinstance(base, nn.Linear)])


def _side_by_side(linears: Sequence[AdaptedLinear]) -> Tensor | None:
    """The linears' biases (D,), zeros for those that have none; None when all have none."""
    biases = [adapted.base.bias for adapted in linears]
    if not any(isinstance(bias, Tensor) for bias in biases):
        return None
    widths = [adapted.out_features for adapted in linears]
    parts = [b if isinstance(b, Tensor) else torch.zeros(n) for b, n in zip(biases, widths, strict=True)]
    return torch.cat(parts).detach()
