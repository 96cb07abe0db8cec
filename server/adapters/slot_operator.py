"""The compiled operator that multiplies one-token rows with their adapters (docs/decisions/0012-slot-operator.md).

It is built when the package is installed and may be missing: then torch computes the same (`server.adapters.slot_mix`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LIBRARY = "server.adapters.native._slot_operator"
INSTRUCTIONS = ("avx512", "avx2", "plain")  # the widest first
TABLE_DTYPES = (torch.float32, torch.float16)


class LinearTables(ctypes.Structure):
    """One linear's tables as the operator reads them: `struct Linear` in native/slot_operator.cpp."""

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
    """The operator, built and loaded, on one of `INSTRUCTIONS`, or on the first one that the processor has.

    Raises OSError where it was not built or the processor lacks the instructions.
    """

    def __init__(self, instructions: str | None = None) -> None:
        spec = importlib.util.find_spec(_LIBRARY)
        if spec is None or spec.origin is None:
            raise OSError("it was not built")
        # Calls keep Python's lock: each takes some microseconds, and asking for the lock back may take milliseconds.
        library = ctypes.PyDLL(spec.origin)
        find, add = library.mhr_find_kernel, library.mhr_add_rows
        find.argtypes, find.restype = [ctypes.c_char_p], ctypes.c_void_p
        kernels = {name: find(name.encode()) for name in INSTRUCTIONS if instructions in (None, name)}
        found = [name for name, kernel in kernels.items() if kernel]
        if not found:
            raise OSError(f"this processor has no {instructions}")
        self.instructions = found[0]
        self._kernel = kernels[found[0]]
        pointer, number = ctypes.c_void_p, ctypes.c_int
        add.argtypes, add.restype = [*[pointer] * 5, number, pointer, ctypes.c_int64, number], None
        self._add_rows = add

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
        """Add to the first rows of y (…, d_out), in place, what the adapters in `slots` (rows,) make of those of
        x (…, d_in); all contiguous on CPU, in fp32 and int64.

        hidden (rows, width): the low-rank inputs of all linears with this input, computed unless `has_hidden`.
        """
        rows = slots.numel()
        self._add_rows(
            self._kernel,
            ctypes.byref(tables),
            x.data_ptr(),
            y.data_ptr(),
            hidden.data_ptr(),
            has_hidden,
            slots.data_ptr(),
            rows,
            min(threads, rows),
        )


@cache
def load_slot_operator() -> SlotOperator | None:
    """The operator; None, with one line in the log, where there is none."""
    try:
        operator = SlotOperator()
    except OSError as error:
        logger.warning(
            "torch multiplies rows with their adapters, which is slower, since the compiled operator cannot be used "
            "(%s); install a C++ compiler with OpenMP and install the server again",
            error,
        )
        return None
    logger.info("rows are multiplied with their adapters by the compiled operator (%s)", operator.instructions)
    return operator
