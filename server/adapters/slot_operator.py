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
        ("is_half", ctypes.c_int64),
    )


class SlotOperator:
    """Rows times the adapters of their slots, by the library."""

    def __init__(self, library: Library) -> None:
        self._kernels = library.kernels
        self._add_rows = library.operator("mhr_add_rows")

    @staticmethod
    def describe(A: Tensor, B: Tensor, first: int) -> LinearTables:
        """Of A (S, width, d_in), of which the linear owns the rows from `first` on, and B (S, r, d_out); both must
        outlive the result.
        """
        assert A.is_contiguous()
        assert B.is_contiguous()
        assert A.dtype == B.dtype
        assert A.dtype in TABLE_DTYPES
        width, d_in = A.shape[1:]
        rank, d_out = B.shape[1:]
        return LinearTables(A.data_ptr(), B.data_ptr(), d_in, width, first, rank, d_out, int(A.dtype == torch.float16))

    def add_rows(
        self, tables: LinearTables, x: Tensor, y: Tensor, hidden: Tensor, has_hidden: bool, slots: Tensor, threads: int
    ) -> None:
        """Add to the first rows of y (…, N, d_out), in place, what the adapters in `slots` (rows,) make of those of
        x (…, N, d_in), leaving rows with NO_SLOT alone; on CPU, in fp32 and int64, and contiguous, but for y, which
        may be some columns of a wider tensor.

        hidden (rows, width): the low-rank inputs of all linears with this input, computed unless `has_hidden`.
        """
        assert y.stride(-1) == 1
        rows = slots.numel()
        self._add_rows(
            self._kernels,
            ctypes.byref(tables),
            x.data_ptr(),
            y.data_ptr(),
            y.stride(-2),
            hidden.data_ptr(),
            has_hidden,
            slots.data_ptr(),
            rows,
            min(threads, rows),
        )
