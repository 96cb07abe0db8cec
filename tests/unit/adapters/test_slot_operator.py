"""The compiled operator against torch, and the server without it."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.adapters import slot_operator
from server.adapters.slot_operator import INSTRUCTIONS, TABLE_DTYPES, SlotOperator, load_slot_operator

ROOT = Path(__file__).resolve().parents[3]


def operators() -> list[SlotOperator]:
    """One on each instruction set of this processor; none where it was not built."""
    found = []
    for name in INSTRUCTIONS:
        try:
            found.append(SlotOperator(name))
        except OSError:
            continue
    return found


OPERATORS = operators()
needs_operator = pytest.mark.skipif(not OPERATORS, reason="the compiled operator was not built")
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.instructions)


@pytest.fixture
def forget_operator() -> Iterator[None]:
    load_slot_operator.cache_clear()
    yield
    load_slot_operator.cache_clear()


def test_a_compiler_is_enough_to_have_the_operator() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    assert OPERATORS, "the package was installed with a compiler at hand and without the operator: `make install`"


@needs_operator
@each_operator
@pytest.mark.parametrize("dtype", TABLE_DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_get_what_torch_computes(operator: SlotOperator, dtype: torch.dtype, threads: int) -> None:
    choose = random.Random(threads)
    for _ in range(60):
        d_in, outs = choose.randint(1, 150), [choose.randint(1, 150) for _ in range(choose.randint(1, 3))]
        num_slots, rank, rows = choose.randint(1, 6), choose.randint(1, 20), choose.randint(1, 12)
        A = torch.randn(num_slots, rank * len(outs), d_in).to(dtype)
        slots = torch.tensor([choose.randrange(num_slots) for _ in range(rows)])
        x = torch.randn(1, rows + choose.randint(0, 2), d_in)
        hidden = torch.empty(rows, rank * len(outs))
        for place, d_out in enumerate(outs):
            B = torch.randn(num_slots, rank, d_out).to(dtype)
            y = torch.randn(1, x.shape[1], d_out)
            expected = y.clone()
            own_A = A[:, place * rank : (place + 1) * rank]
            for row, slot in enumerate(slots):
                expected[0, row] += (x[0, row] @ own_A[slot].float().T) @ B[slot].float()
            tables = operator.describe(A, B, place * rank)
            operator.add_rows(tables, x, y, hidden, place > 0, slots, threads)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
            assert torch.equal(y[0, rows:], expected[0, rows:])


@needs_operator
@each_operator
def test_no_rows_are_no_work(operator: SlotOperator) -> None:
    A = B = torch.ones(1, 1, 4)
    tables = operator.describe(A, B, 0)
    y = torch.zeros(1, 0, 4)
    operator.add_rows(tables, y, y, torch.empty(0, 1), False, torch.empty(0, dtype=torch.int64), 2)


@needs_operator
@each_operator
def test_a_rows_numbers_do_not_depend_on_the_batch_or_the_threads(operator: SlotOperator) -> None:
    A, B = torch.randn(4, 5, 70), torch.randn(4, 5, 90)
    tables = operator.describe(A, B, 0)
    x, y = torch.randn(1, 9, 70), torch.randn(1, 9, 90)
    slots = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3])

    def add(rows: slice, threads: int) -> Tensor:
        part, out = x[:, rows].contiguous(), y[:, rows].contiguous()
        own = slots[rows].contiguous()
        operator.add_rows(tables, part, out, torch.empty(len(own), 5), False, own, threads)
        return out[0]

    together = add(slice(0, 9), 1)
    assert torch.equal(together, add(slice(0, 9), 4))
    for row in range(9):
        assert torch.equal(together[row], add(slice(row, row + 1), 1)[0])


@needs_operator
@each_operator
def test_every_fp16_number_is_read_as_it_is(operator: SlotOperator) -> None:
    numbers = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    A = torch.ones(1, 1, 1, dtype=torch.float16)
    tables = operator.describe(A, numbers.view(1, 1, -1), 0)
    y = torch.zeros(1, 1, len(numbers))
    slots = torch.zeros(1, dtype=torch.int64)
    operator.add_rows(tables, torch.ones(1, 1, 1), y, torch.empty(1, 1), False, slots, 1)
    assert torch.equal(y[0, 0].nan_to_num(nan=-1.0), numbers.float().nan_to_num(nan=-1.0))


@needs_operator
def test_unknown_instructions_are_refused() -> None:
    with pytest.raises(OSError, match="this processor has no mmx"):
        SlotOperator("mmx")


def test_without_the_library_there_is_no_operator_and_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget_operator: None
) -> None:
    monkeypatch.setattr(slot_operator, "_LIBRARY", "server.adapters.native._not_built")
    with caplog.at_level(logging.WARNING):
        assert load_slot_operator() is None
        assert load_slot_operator() is None
    assert len(caplog.records) == 1
    assert "it was not built" in caplog.text
    assert "install a C++ compiler" in caplog.text


def test_a_library_that_does_not_load_is_no_operator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget_operator: None, tmp_path: Path
) -> None:
    (tmp_path / "damaged_operator.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(slot_operator, "_LIBRARY", "damaged_operator")
    assert load_slot_operator() is None
    assert "damaged_operator.so" in caplog.text


@pytest.mark.parametrize("compiler", ["false", "missing-compiler"])
def test_a_build_without_a_compiler_succeeds_without_the_operator(tmp_path: Path, compiler: str) -> None:
    shutil.copytree(ROOT / "server" / "adapters" / "native", tmp_path / "server" / "adapters" / "native")
    for library in tmp_path.rglob("*.so"):
        library.unlink()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"CC": compiler, "CXX": compiler}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*.so"))
