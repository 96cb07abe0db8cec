from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server import worker_process
from server.settings import Settings
from server.training.worker import Worker


@pytest.fixture(autouse=True)
def _this_process_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("given", "threads"), [({}, None), ({"worker_threads": 3}, 3), ({"threads": 5}, None)])
def test_the_worker_computes_with_its_own_number_of_threads_or_torchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: dict[str, int], threads: int | None
) -> None:
    torchs_choice = torch.get_num_threads()
    seen: list[int] = []

    def run(worker: Worker, stopping: threading.Event) -> None:
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(Worker, "run", run)
    worker_process.run(Settings(data_dir=tmp_path, **given))
    assert seen == [threads or torchs_choice]
