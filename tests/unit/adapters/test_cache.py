from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch

from server.adapters.assembly import Adapter, LowRank
from server.adapters.cache import AdapterCache

SIZE = 80  # bytes of the adapters below


def make_adapter(value: float = 0.0, scale: int = 1) -> Adapter:
    """An adapter of SIZE * scale bytes that carries `value`."""
    pair = LowRank(A=torch.full((4 * scale, 2), value), B=torch.full((2, 6 * scale), value))
    return Adapter(weights={"q": pair}, alpha=1.0, rank=2)


def never() -> Adapter:
    pytest.fail("the adapter should have been in the cache")


def fill(cache: AdapterCache, key: str, scale: int = 1) -> None:
    cache.get(key, lambda: make_adapter(scale=scale)).release()


def holds(cache: AdapterCache, key: str) -> bool:
    before = cache.stats().misses
    cache.get(key, make_adapter).release()
    return cache.stats().misses == before


def test_size_is_as_the_tests_assume() -> None:
    assert make_adapter().num_bytes == SIZE
    assert make_adapter(scale=3).num_bytes == 3 * SIZE


def test_second_lookup_gives_the_first_ones_adapter() -> None:
    cache = AdapterCache(10 * SIZE)
    with cache.get("a", make_adapter) as first:
        pass
    with cache.get("a", never) as second:
        assert second.adapter is first.adapter
        assert second.key == "a"
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.bytes) == (1, 1, 1, SIZE)
    cache.check_integrity()


def test_least_recently_used_leaves_first() -> None:
    cache = AdapterCache(2 * SIZE)
    fill(cache, "a")
    fill(cache, "b")
    fill(cache, "a")
    fill(cache, "c")
    assert cache.stats().evictions == {"budget": 1}
    assert holds(cache, "a")
    assert holds(cache, "c")
    assert not holds(cache, "b")
    cache.check_integrity()


def test_large_entry_pushes_out_as_many_as_it_needs() -> None:
    cache = AdapterCache(4 * SIZE)
    for key in "abcd":
        fill(cache, key)
    fill(cache, "large", scale=3)
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.evictions) == (2, 4 * SIZE, {"budget": 3})
    assert holds(cache, "d")


def test_pinned_entries_stay_even_over_budget_and_leave_when_released() -> None:
    cache = AdapterCache(SIZE)
    pins = [cache.get(key, make_adapter) for key in "abc"]
    stats = cache.stats()
    assert (stats.entries, stats.pinned_entries, stats.pinned_bytes) == (3, 3, 3 * SIZE)
    assert stats.over_budget == 2
    cache.check_integrity()
    pins[0].release()
    pins[2].release()
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.evictions) == (1, SIZE, {"budget": 2})
    cache.check_integrity()
    assert holds(cache, "b")


def test_entry_pinned_twice_needs_both_releases() -> None:
    cache = AdapterCache(0)
    first = cache.get("a", make_adapter)
    second = cache.get("a", never)
    first.release()
    first.release()
    assert cache.stats().pinned_entries == 1
    second.release()
    assert cache.stats().entries == 0
    cache.check_integrity()


def test_entry_above_the_whole_budget_is_evicted_with_its_own_reason() -> None:
    cache = AdapterCache(2 * SIZE)
    fill(cache, "small")
    fill(cache, "huge", scale=3)
    assert cache.stats().evictions == {"budget": 1, "too_large": 1}
    assert cache.stats().entries == 0


def test_zero_budget_keeps_nothing_unpinned() -> None:
    cache = AdapterCache(0)
    fill(cache, "a")
    assert cache.stats().entries == 0
    assert not holds(cache, "a")


def test_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes or more"):
        AdapterCache(-1)


def test_failed_assembly_is_raised_and_not_kept() -> None:
    cache = AdapterCache(10 * SIZE)

    def fails() -> Adapter:
        raise KeyError("blob")

    with pytest.raises(KeyError, match="blob"):
        cache.get("a", fails)
    assert cache.stats().failures == 1
    assert cache.stats().entries == 0
    with cache.get("a", make_adapter):
        assert cache.stats().misses == 2
    cache.check_integrity()


def wait_for_joiners(cache: AdapterCache, count: int) -> None:
    pause = threading.Event()
    while cache.stats().joined < count:
        pause.wait(0.001)


def in_threads(count: int, work: Callable[[], object]) -> list[object]:
    """The results (or exceptions) of `count` threads running `work`."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(work) for _ in range(count)]
        return [future.exception() or future.result() for future in futures]


def test_threads_share_one_assembly() -> None:
    cache = AdapterCache(0)  # nothing would survive without the pins
    built: list[Adapter] = []

    def build() -> Adapter:
        wait_for_joiners(cache, 7)
        built.append(make_adapter())
        return built[-1]

    pins = in_threads(8, lambda: cache.get("a", build))
    adapters = {id(pin.adapter) for pin in pins}  # type: ignore[attr-defined]
    assert adapters == {id(built[0])}
    assert len(built) == 1
    assert cache.stats().joined == 7
    cache.check_integrity()
    for pin in pins:
        pin.release()  # type: ignore[attr-defined]
    assert cache.stats().entries == 0
    cache.check_integrity()


def test_failed_assembly_reaches_every_waiter() -> None:
    cache = AdapterCache(10 * SIZE)
    calls = []

    def build() -> Adapter:
        calls.append(1)
        wait_for_joiners(cache, 4)
        raise RuntimeError("damaged blob")

    errors = in_threads(5, lambda: cache.get("a", build))
    assert [str(error) for error in errors] == ["damaged blob"] * 5
    assert len(calls) == 1
    cache.check_integrity()


def test_assembly_of_one_key_does_not_hold_up_another() -> None:
    cache = AdapterCache(10 * SIZE)
    release = threading.Event()

    def slow() -> Adapter:
        assert release.wait(10)
        return make_adapter()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(cache.get, "slow", slow)
        cache.get("other", make_adapter).release()
        release.set()
        future.result(10).release()
    assert cache.stats().entries == 2


def test_many_threads_keep_the_accounts_straight() -> None:
    cache = AdapterCache(5 * SIZE)

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(200):
            number = random.randrange(12)
            with cache.get(str(number), lambda number=number: make_adapter(number, 1 + number % 3)) as pin:
                assert pin.adapter.weights["q"].A[0, 0].item() == number
            if random.random() < 0.1:
                cache.check_integrity()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, seed) for seed in range(8)]:
            future.result()
    stats = cache.stats()
    assert stats.hits + stats.misses + stats.joined == 1600
    assert stats.pinned_entries == 0
    assert stats.bytes <= 5 * SIZE
    cache.check_integrity()
