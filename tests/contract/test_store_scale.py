"""Ten thousand tasks are an ordinary number. Limits are many times what was measured, for slow machines."""

from __future__ import annotations

import time

from adapters_store import TaskSeed

TASKS = 10_000


def test_ten_thousand_tasks_are_added_listed_and_resolved_fast(store):
    seeds = [TaskSeed(f"task-{number:05d}", "do it", f"routing {number}".encode()) for number in range(TASKS)]
    begin = time.perf_counter()
    store.add_inventory(
        "big",
        b"tensors",
        backbone_fingerprint="f",
        num_skills=8,
        num_heads=8,
        rank=4,
        alpha=1.0,
        metadata={},
        tasks=seeds,
    )
    added_s = time.perf_counter() - begin
    assert store.count_tasks() == TASKS

    begin = time.perf_counter()
    seen, cursor = [], None
    while not seen or cursor is not None:
        page = store.list_tasks(100, cursor)
        seen += [task.id for task in page.items]
        cursor = page.next_cursor
    listed_s = time.perf_counter() - begin
    assert seen == [seed.id for seed in seeds]

    begin = time.perf_counter()
    for number in range(0, TASKS, 100):
        assert store.get_version(f"task-{number:05d}").number == 1
    resolved_s = time.perf_counter() - begin

    # Measured on two busy cores: 4 s, 0.3 s and 0.05 s.
    assert added_s < 60
    assert listed_s < 5
    assert resolved_s < 2
