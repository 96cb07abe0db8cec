from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.kv_cache import SlotPool


def test_the_lowest_free_slot_comes_first() -> None:
    pool = SlotPool(4)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    assert not pool.can_allocate
    pool.free(2)
    pool.free(0)
    assert [pool.allocate(), pool.allocate()] == [0, 2]
    pool.check_integrity()


def test_a_slot_that_is_not_in_use_cannot_be_freed() -> None:
    pool = SlotPool(2)
    with pytest.raises(AssertionError, match="slot 1 is not in use"):
        pool.free(1)


@given(st.lists(st.integers(0, 7), max_size=60))
def test_no_slot_is_lost_or_given_twice(actions: list[int]) -> None:
    pool = SlotPool(5)
    used: list[int] = []
    for action in actions:
        if action < 4 and pool.can_allocate:
            used.append(pool.allocate())
        elif used:
            pool.free(used.pop(action % len(used)))
        assert len(set(used)) == len(used) == pool.num_used
        pool.check_integrity()
