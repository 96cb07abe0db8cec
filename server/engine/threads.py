"""Which threads compute in parallel: the engine's alone.

GNU OpenMP, which torch uses on Linux, keeps a team of workers for every living thread that has computed in
parallel. Once all teams together are larger than the machine, workers sleep between operations instead of
spinning: on 2 cores a decoding step of one row then takes 55 ms in place of 33.
"""

from __future__ import annotations

import threading

import torch

_TORCHS_CHOICE = torch.get_num_threads()


def compute_in_team(threads: int | None) -> None:
    """Let this thread compute with so many threads, None for torch's own choice, and threads to come alone."""
    _set_number(threads or _TORCHS_CHOICE)
    # The number just set is also what threads to come begin with; one that ends at once sets that back.
    setter = threading.Thread(target=compute_alone)
    setter.start()
    setter.join()


def compute_alone() -> None:
    """Let this thread compute without workers. Call it before the thread's first matrix product."""
    _set_number(1)


def _set_number(threads: int) -> None:
    torch.get_num_threads()  # settles the thread's number, which another thread's setting would else replace
    torch.set_num_threads(threads)
