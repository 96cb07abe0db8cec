"""The compiled operator that keeps one new token of each sequence and lets it attend to its sequence.

Without it torch computes the same, in more operations (`server.engine.attention`).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from server.native.library import Library

_VECTOR = 16  # numbers of the widest one: an operator writes weights in whole vectors
_HEADS = 4  # query heads at once


class _Cache(ctypes.Structure):
    """`struct Cache` in server/native/operators.cpp."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("context", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
    )


class _Heads(ctypes.Structure):
    """`struct Heads` there."""

    _fields_ = (("numbers", ctypes.c_void_p), ("head_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64))


class AttentionOperator:
    """Attention of decode rows over a cache in fp32 on CPU, by the library."""

    def __init__(self, library: Library) -> None:
        self._kernels = library.kernels
        self._attend = library.operator("mhr_attend")

    def attend(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache_rows: Tensor,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Of the first D rows of query (H, N, head_dim), key and value (KVH, N, head_dim) -> (D, H, head_dim).

        keys, values (S, C, KVH, head_dim): the cache, which takes the new tokens at cache_rows (D,) = slot * C +
        position; a token sees its slot's tokens up to itself, or the last `window` of them.
        """
        assert keys.shape == values.shape, "a wrong size would be written beside the cache"
        context, kv_heads, head_dim = keys.shape[1:]
        rows, threads = len(cache_rows), torch.get_num_threads()
        cache = _Cache(
            keys.data_ptr(),
            values.data_ptr(),
            context,
            kv_heads,
            len(query) // kv_heads,
            head_dim,
            context if window is None else window,
        )
        out = torch.empty(rows, len(query), head_dim)
        room = torch.empty(threads, _HEADS, context + _VECTOR)
        self._attend(
            self._kernels,
            ctypes.byref(cache),
            *(ctypes.byref(_heads(states)) for states in (query, key, value)),
            cache_rows.data_ptr(),
            rows,
            scaling,
            room.data_ptr(),
            out.data_ptr(),
            threads,
        )
        return out


def _heads(states: Tensor) -> _Heads:
    """states (heads, rows, head_dim), the last dimension contiguous."""
    assert states.stride(2) == 1
    return _Heads(states.data_ptr(), states.stride(0), states.stride(1))
