from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from server.memory import lazy_zeros

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dense", [False, True])
def test_zeros(dtype: torch.dtype, dense: bool) -> None:
    zeros = lazy_zeros((3, 5), dtype, CPU, dense=dense)
    assert torch.equal(zeros, torch.zeros(3, 5, dtype=dtype))
    zeros[1] = 2
    assert zeros.sum() == 10


def test_nothing_has_no_memory() -> None:
    assert lazy_zeros((0, 4), torch.float32, CPU).shape == (0, 4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the resident memory here")
def test_memory_is_taken_where_it_is_written() -> None:
    before = resident_bytes()
    zeros = lazy_zeros((64, 4 * MIB), torch.uint8, CPU)
    zeros[:, ::MIB] = 1
    assert resident_bytes() - before < 16 * MIB
    del zeros


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
