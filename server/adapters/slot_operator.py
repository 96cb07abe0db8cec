"""The compiled operator that multiplies rows with their adapters.

Without it torch computes the same (`server.adapters.slot_mix`).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from server.native.library import Library

TABLE_DTYPES = (torch.float32, torch.float16)
NO_SLOT = -1  # of a row without an adapter
ROWS_AT_ONCE = 4  # of one slot


class LinearTables(ctypes.Structure):
    """One linear's tables as the operator reads them: `struct Linear` in server/native/operators.cpp."""

    _fields_ = (
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("d_in", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("d_out", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("is_half", ctypes.c_int64),
    )


GroupTables = ctypes.Array[LinearTables]  # of linears that read the same input


def describe(A: Tensor, B: Tensor, first: int, column: int) -> LinearTables:
    """Tables of A (S, width, d_in), of which the linear owns the rows from `first` on, and B (S, r, d_out), whose
    outputs go to a row's numbers from `column` on; both must outlive the result.
    """
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert A.dtype == B.dtype
    assert A.dtype in TABLE_DTYPES
    width, d_in = A.shape[1:]
    rank, d_out = B.shape[1:]
    is_half = int(A.dtype == torch.float16)
    return LinearTables(A.data_ptr(), B.data_ptr(), d_in, width, first, rank, d_out, column, is_half)


class SlotOperator:
    """Rows times the adapters of their slots, by the library."""

    def __init__(self, library: Library) -> None:
        self._kernels = library.kernels
        self._add_rows = library.operator("mhr_add_rows")

    def add_rows(self, tables: GroupTables, x: Tensor, y: Tensor, slots: Tensor, room: Tensor, threads: int) -> None:
        """Add to the first rows of y (…, N, D), in place, what the adapters in `slots` (rows,) make of those of
        x (…, N, d_in), leaving rows with NO_SLOT alone; on CPU, in fp32 and int64, the numbers of a row side by side.

        `room` is (threads, ROWS_AT_ONCE, the largest rank).
        """
        assert x.is_contiguous()
        assert y.stride(-1) == 1
        self._add_rows(
            self._kernels,
            tables,
            len(tables),
            x.data_ptr(),
            y.data_ptr(),
            y.stride(-2),
            slots.data_ptr(),
            len(slots),
            room.data_ptr(),
            threads,
        )
