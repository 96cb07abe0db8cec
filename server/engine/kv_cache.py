"""Accounting of cache slots: one slot holds the keys and values of one sequence. No torch here."""

from __future__ import annotations

import heapq


class SlotPool:
    """Hands out slots 0 … num_slots-1, the lowest free one first, so that the used ones stay compact."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))  # a heap
        self._used: set[int] = set()

    @property
    def num_used(self) -> int:
        return len(self._used)

    @property
    def can_allocate(self) -> bool:
        return bool(self._free)

    def allocate(self) -> int:
        """The lowest free slot; ask `can_allocate` first."""
        assert self._free, "no cache slot is free"
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        assert slot in self._used, f"cache slot {slot} is not in use"
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def check_integrity(self) -> None:
        """Assert that every slot is either free or used, once."""
        assert len(set(self._free)) == len(self._free), "a cache slot is free twice"
        assert sorted([*self._free, *self._used]) == list(range(self.num_slots)), "cache slots were lost or invented"
