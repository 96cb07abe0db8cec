from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from server.training.lanes import Lanes


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_items_are_computed_side_by_side_and_come_back_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)  # nobody passes it alone

    def compute(item: int) -> int:
        meeting.wait()
        return 10 * item

    assert list(Lanes(torch.device("cpu")).map(compute, [1, 2, 3])) == [10, 20, 30]


def test_more_items_than_lanes_wait_for_one() -> None:
    assert list(Lanes(torch.device("cpu")).map(lambda item: item + 1, list(range(20)))) == list(range(1, 21))


@pytest.mark.parametrize(("items", "each"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_lanes_share_out_torchs_threads_and_give_them_back(items: int, each: int) -> None:
    seen = list(Lanes(torch.device("cpu")).map(lambda _: torch.get_num_threads(), list(range(items))))
    assert seen == [each] * items
    assert torch.get_num_threads() == 4


def test_an_error_reaches_the_caller_when_all_lanes_have_ended() -> None:
    all_begun = threading.Barrier(3, timeout=30)
    ended = []

    def fail_at_once_or_end_late(item: int) -> None:
        all_begun.wait()
        if item == 1:
            raise ValueError("the first item")
        time.sleep(0.2)
        ended.append(item)

    with pytest.raises(ValueError, match="the first item"):
        list(Lanes(torch.device("cpu")).map(fail_at_once_or_end_late, [1, 2, 3]))
    assert sorted(ended) == [2, 3]
    assert torch.get_num_threads() == 4


def test_one_lane_on_a_gpu() -> None:
    here = threading.get_ident()
    assert list(Lanes(torch.device("cuda")).map(lambda _: threading.get_ident(), [1, 2])) == [here, here]


@pytest.mark.parametrize(
    ("threads", "batch_size", "piece_size"), [(1, 8, 8), (2, 8, 4), (2, 3, 3), (8, 8, 4), (2, 16, 8)]
)
def test_pieces_are_as_many_as_lanes_unless_they_would_be_too_small(
    threads: int, batch_size: int, piece_size: int
) -> None:
    torch.set_num_threads(threads)
    assert Lanes(torch.device("cpu")).piece_size(batch_size) == piece_size
