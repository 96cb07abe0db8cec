"""Large tensors of zeros whose memory is only taken where it is used."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, dense: bool = False) -> Tensor:
    """Zeros of `shape`. On CPU the operating system supplies a page when it is first written, so that a table for
    the largest batch costs only what the real ones need; torch.zeros would write all of it.

    `dense` memory is written from its beginning on without gaps and gets huge pages, of which there are few to supply.
    Otherwise pages are small: a key-value cache is written in a few places of every two megabytes, which as one huge
    page would take all of them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # only Linux has them
        pages.madvise(mmap.MADV_HUGEPAGE if dense else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
