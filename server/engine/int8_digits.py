"""Before and behind an 8-bit product: activations into two digits, and the digits' products into one number each.

Letters: N rows, d numbers of a row, D columns of a product.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from server.native.library import Library, threads_for

LARGEST = 127
BASE = 254  # of an activation's second digit: half a step is 127 of them
OFFSET = 128  # of activations, which the product takes without a sign
_SMALLEST = 1e-30  # stands for the scale of a row of zeros


class Digits(Protocol):
    """The arithmetic around a product."""

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, d) -> digits (2, N, d) in uint8, OFFSET more than they are, and scales (N, 1) in fp32.

        A row is about scale * (first + second / BASE); one that is not finite gets a scale that is not finite.
        """
        ...

    def join(self, products: Tensor, scales: Tensor) -> Tensor:
        """The digits' products (2, N, D), with scales (N, 1) -> (N, D) in fp32."""
        ...


class TorchDigits:
    """Digits by torch: the reference."""

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Digits`."""
        steps, scales = to_steps(x)
        digits = torch.empty(2, *x.shape, dtype=torch.int8)
        first = steps.round()
        digits[0] = first
        digits[1] = steps.sub_(first).mul_(BASE).round_()
        return digits.view(torch.uint8).bitwise_xor_(OFFSET), scales  # adds the offset

    def join(self, products: Tensor, scales: Tensor) -> Tensor:
        """See `Digits`."""
        return torch.add(products[0], products[1], alpha=1 / BASE).mul_(scales)


class CompiledDigits:
    """Digits by the library: one operator in place of a dozen, and the same digits."""

    def __init__(self, library: Library) -> None:
        self._kernels = library.kernels
        self._quantise_rows = library.operator("mhr_quantise_rows")
        self._join_rows = library.operator("mhr_join_rows")

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Digits`."""
        x = x.float().contiguous()
        rows, d = x.shape
        threads = threads_for(x.numel())
        digits = torch.empty(2, rows, d, dtype=torch.uint8)
        scales, room = torch.empty(rows, 1), torch.empty(threads, d)
        self._quantise_rows(
            self._kernels, x.data_ptr(), rows, d, room.data_ptr(), digits.data_ptr(), scales.data_ptr(), threads
        )
        return digits, scales

    def join(self, products: Tensor, scales: Tensor) -> Tensor:
        """See `Digits`; products contiguous."""
        _, rows, width = products.shape
        y = torch.empty(rows, width)
        threads = threads_for(y.numel())
        self._join_rows(self._kernels, products.data_ptr(), scales.data_ptr(), rows, width, y.data_ptr(), threads)
        return y


def to_steps(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (N, d) -> the same in steps of their scales (N, 1), in fp32; a row's largest number is LARGEST steps."""
    rows = rows.float()
    scales = rows.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST).mul_(1 / LARGEST)
    return torch.mul(rows, scales.reciprocal()), scales
