from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from server.engine.threads import compute_alone, compute_in_team


@pytest.fixture(autouse=True)
def _own_number() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_new_thread(work: Callable[[], None]) -> list[int]:
    """How many threads a new thread computes with after `work`, and how many a thread after that begins with."""
    numbers: list[int] = []

    def run() -> None:
        work()
        numbers.append(torch.get_num_threads())

    for target in (run, lambda: numbers.append(torch.get_num_threads())):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    return numbers


def test_only_the_thread_that_asks_computes_in_a_team() -> None:
    assert in_new_thread(lambda: compute_in_team(3)) == [3, 1]


def test_torchs_own_choice_holds_without_a_number() -> None:
    code = "import torch; n = torch.get_num_threads(); from server.engine.threads import compute_in_team; "
    code += "torch.set_num_threads(n + 1); compute_in_team(None); assert torch.get_num_threads() == n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_threads_compute_alone_and_leave_the_team_as_it_is() -> None:
    begun, checked = threading.Event(), threading.Event()
    numbers: list[int] = []

    def engine() -> None:
        compute_in_team(3)
        begun.set()
        assert checked.wait(10)
        numbers.append(torch.get_num_threads())

    thread = threading.Thread(target=engine)
    thread.start()
    assert begun.wait(10)
    assert in_new_thread(compute_alone) == [1, 1]
    checked.set()
    thread.join()
    assert numbers == [3]
