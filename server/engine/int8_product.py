"""The product of rows with an 8-bit weight: by matrix tiles of the processor where there are any, else by oneDNN.

Letters: N rows, d_in and d_out of a weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.int8_digits import BASE, OFFSET, CompiledDigits, Digits, TorchDigits, to_steps
from server.native.library import Library, threads_for

_BLOCK = 4096  # rows of a weight quantised at once, which bounds the memory that it takes
_TILE = 16  # rows of a tile
_TILE_BYTES = 64  # of a row of a tile


@dataclass(frozen=True)
class Int8Weight:
    """A weight as `values * scales[:, None]`."""

    values: Tensor  # (d_out, d_in) int8, -127 … 127
    scales: Tensor  # (d_out,) fp32


class Int8Product(Protocol):
    """Computes what `plain_product` does, up to the rounding of its last steps."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, d_in) in fp32 -> (N, d_out) in fp32."""
        ...


def make_product(weight: Int8Weight, library: Library | None) -> Int8Product:
    """The fastest product there is. Raises NotImplementedError where there is none."""
    if library is not None and library.has_tiles:
        return TileProduct(weight, library)
    return OneDnnProduct(weight, TorchDigits() if library is None else CompiledDigits(library))


def quantise_weights(weights: Iterable[Tensor]) -> Int8Weight:
    """Weights (d_out, d_in) of one d_in as one, below each other, with a scale for each output channel."""
    blocks = [to_steps(block) for weight in weights for block in torch.split(weight.detach(), _BLOCK)]
    return Int8Weight(
        torch.cat([steps.round_().to(torch.int8) for steps, _ in blocks]),
        torch.cat([scales[:, 0] for _, scales in blocks]),
    )


def plain_product(x: Tensor, weight: Int8Weight) -> Tensor:
    """x (N, d_in) -> (N, d_out) in fp32, step by step in plain torch: what the 8-bit linears compute."""
    digits, scales = TorchDigits().quantise(x)
    sums = (digits.double() - OFFSET) @ weight.values.double().T  # (2, N, d_out) whole numbers, exact in this type
    products = sums.float() * weight.scales
    return (products[0] + products[1] / BASE) * scales


class OneDnnProduct:
    """By oneDNN, with the weight packed once in the processor's own layout.

    Raises NotImplementedError where torch was built without it.
    """

    def __init__(self, weight: Int8Weight, digits: Digits) -> None:
        if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            raise NotImplementedError("this build of torch has no 8-bit products (oneDNN)")
        self._digits = digits
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.values, None)
        self._scales = weight.scales
        self._zero_points = torch.zeros(len(weight.scales), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Int8Product`."""
        digits, scales = self._digits.quantise(x)
        products: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits.flatten(0, 1),
            1.0,
            OFFSET,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return self._digits.join(products.view(2, len(x), len(self._scales)), scales)


class _Int8Weight(ctypes.Structure):
    """`struct Int8Weight` in server/native/operators.cpp."""

    _fields_ = (
        ("pairs", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("d_in", ctypes.c_int64),
        ("d_out", ctypes.c_int64),
    )


class TileProduct:
    """By the library on a processor with matrix tiles (AMX), the digits included, in one call."""

    def __init__(self, weight: Int8Weight, library: Library) -> None:
        self._kernels = library.kernels
        self._multiply = library.operator("mhr_int8_rows")
        self._d_out, self._d_in = weight.values.shape
        self._pairs = _in_pairs(weight.values)
        self._scales = weight.scales
        self._offsets = OFFSET * weight.values.sum(1, dtype=torch.int32)
        pointers = (t.data_ptr() for t in (self._pairs, self._scales, self._offsets))
        self._weight = _Int8Weight(*pointers, self._d_in, self._d_out)

    def __call__(self, x: Tensor) -> Tensor:
        """See `Int8Product`."""
        x = x.contiguous()
        rows, threads = len(x), threads_for(self._pairs.numel())
        y = torch.empty(rows, self._d_out)
        digits = torch.empty(2, _round_up(rows, _TILE), _round_up(self._d_in, _TILE_BYTES), dtype=torch.uint8)
        scales, room = torch.empty(rows), torch.empty(threads, self._d_in)
        self._multiply(
            self._kernels,
            ctypes.byref(self._weight),
            x.data_ptr(),
            rows,
            y.data_ptr(),
            digits.data_ptr(),
            scales.data_ptr(),
            room.data_ptr(),
            threads,
        )
        return y


def _in_pairs(values: Tensor) -> Tensor:
    """values (d_out, d_in) as tiles take them: (d_out / 32, d_in / 64, 2, 16, 16, 4), with zeros where they end.

    A tile has 16 channels side by side, 4 neighbouring numbers of each; two tiles of channels follow each other.
    """
    d_out, d_in = values.shape
    padded = F.pad(values, (0, -d_in % _TILE_BYTES, 0, -d_out % (2 * _TILE)))
    split = padded.view(-1, 2, _TILE, padded.shape[1] // _TILE_BYTES, _TILE_BYTES // 4, 4)
    return split.permute(0, 3, 1, 4, 2, 5).contiguous()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
