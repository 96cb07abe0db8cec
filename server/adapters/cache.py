"""Assembled adapters by digest within a byte budget: least recently used goes first, pinned never goes."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

from server.adapters.assembly import Adapter

EVICTED_FOR_ROOM = "budget"
EVICTED_TOO_LARGE = "too_large"


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of the cache; counts run from the cache's creation, `bytes` and `entries` are of this moment."""

    hits: int
    misses: int  # lookups that assembled
    joined: int  # lookups that waited for another thread's assembly of the same key
    failures: int  # assemblies that raised; nothing was kept of them
    evictions: Mapping[str, int]  # reason -> count: "budget" (made room), "too_large" (above the budget by itself)
    over_budget: int  # insertions after which the pinned entries alone exceeded the budget
    budget_bytes: int
    bytes: int
    pinned_bytes: int
    entries: int
    pinned_entries: int


@dataclass
class _Entry:
    adapter: Adapter
    num_bytes: int
    pins: int = 0


@dataclass
class _Assembly:
    """One assembly under way."""

    done: Future[_Entry] = field(default_factory=Future)
    waiters: int = 0  # threads that wait for it; the entry comes in pinned once for each


class PinnedAdapter:
    """An adapter that stays in the cache until `release()`, which may be called more than once; a context manager."""

    def __init__(self, key: str, adapter: Adapter, release: Callable[[], None]) -> None:
        self.key = key
        self.adapter = adapter
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let the cache evict the adapter again. The adapter itself stays usable by whoever still holds it."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> PinnedAdapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class AdapterCache:
    """Assembled adapters by key (a digest that identifies the adapter). Thread-safe.

    Pinned entries may exceed the budget, since requests in flight need them; this is counted, and the
    excess leaves as soon as it is released.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"the cache's budget must be 0 bytes or more, not {budget_bytes}")
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._assemblies: dict[str, _Assembly] = {}
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._evictions: Counter[str] = Counter()

    def get(self, key: str, build: Callable[[], Adapter]) -> PinnedAdapter:
        """The adapter of `key`, pinned; `build` assembles it, in this thread, when the cache does not hold it.

        Threads that ask for a key under assembly wait for that one assembly. Whatever `build` raises is
        raised to all of them, and the next call assembles again.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._counts["hits"] += 1
                entry.pins += 1
                self._entries.move_to_end(key)
                return self._pinned(key, entry)
            assembly = self._assemblies.get(key)
            mine = assembly is None
            if assembly is None:
                self._counts["misses"] += 1
                assembly = self._assemblies[key] = _Assembly()
            else:
                self._counts["joined"] += 1
                assembly.waiters += 1
        if mine:
            self._assemble(key, build, assembly)
        return self._pinned(key, assembly.done.result())

    def stats(self) -> CacheStats:
        """A consistent snapshot for metrics."""
        with self._lock:
            pinned = [entry.num_bytes for entry in self._entries.values() if entry.pins]
            return CacheStats(
                hits=self._counts["hits"],
                misses=self._counts["misses"],
                joined=self._counts["joined"],
                failures=self._counts["failures"],
                evictions=dict(self._evictions),
                over_budget=self._counts["over_budget"],
                budget_bytes=self._budget_bytes,
                bytes=self._bytes,
                pinned_bytes=sum(pinned),
                entries=len(self._entries),
                pinned_entries=len(pinned),
            )

    def check_integrity(self) -> None:
        """Assert that the accounts add up; for idle moments and the end of tests."""
        with self._lock:
            entries = self._entries.values()
            assert self._bytes == sum(entry.num_bytes for entry in entries), "bytes disagree with the entries"
            assert all(entry.num_bytes == entry.adapter.num_bytes for entry in entries), "an entry changed its size"
            assert all(entry.pins >= 0 for entry in entries), "an entry was released more often than pinned"
            assert not self._entries.keys() & self._assemblies.keys(), "a key is both held and under assembly"
            unpinned = any(entry.pins == 0 for entry in entries)
            assert self._bytes <= self._budget_bytes or not unpinned, "over budget while entries could be evicted"

    def _assemble(self, key: str, build: Callable[[], Adapter], assembly: _Assembly) -> None:
        try:
            adapter = build()
            entry = _Entry(adapter, adapter.num_bytes)
        except BaseException as error:
            with self._lock:
                self._counts["failures"] += 1
                del self._assemblies[key]
            assembly.done.set_exception(error)
            return
        with self._lock:
            del self._assemblies[key]
            entry.pins = 1 + assembly.waiters
            self._entries[key] = entry
            self._bytes += entry.num_bytes
            self._make_room()
            self._counts["over_budget"] += self._bytes > self._budget_bytes
        assembly.done.set_result(entry)

    def _pinned(self, key: str, entry: _Entry) -> PinnedAdapter:
        return PinnedAdapter(key, entry.adapter, lambda: self._unpin(entry))

    def _unpin(self, entry: _Entry) -> None:
        with self._lock:
            entry.pins -= 1
            self._make_room()

    def _make_room(self) -> None:
        """Evict unpinned entries, least recently used first, until the rest fits; lock held."""
        if self._bytes <= self._budget_bytes:
            return
        for key in [key for key, entry in self._entries.items() if entry.pins == 0]:
            num_bytes = self._entries.pop(key).num_bytes
            self._bytes -= num_bytes
            self._evictions[EVICTED_TOO_LARGE if num_bytes > self._budget_bytes else EVICTED_FOR_ROOM] += 1
            if self._bytes <= self._budget_bytes:
                return
