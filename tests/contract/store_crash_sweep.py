"""Run by test_store_crash.py: kill each operation of the store before each of its steps on disk.

A step is an fsync, a rename, an unlink, or a statement or commit sent to SQLite. For every operation a
forked child works on a fresh copy of one data directory and is killed (SIGKILL) before step 1, then 2, and
so on until it lives. Prints one JSON line per operation: the state found after each kill ("old", "new" or
what it was instead).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from adapters_store import Store, TaskSeed

SHAPE: dict[str, Any] = {
    "backbone_fingerprint": "f",
    "num_skills": 2,
    "num_heads": 2,
    "rank": 2,
    "alpha": 1.0,
    "metadata": {},
}
ADAPTER: dict[str, Any] = {"kind": "adapter", "inventory": None, "defaults": {}, "metadata": {}}
NOW = datetime(2030, 1, 1, tzinfo=UTC)
RUNNING, QUEUED = 0, 1


def fill(store: Store) -> None:
    store.add_inventory("small", b"tensors", tasks=[TaskSeed("a", "A", b"routing a")], **SHAPE)
    store.register_task("t", instruction="old", blob=b"old", **ADAPTER)
    store.add_version("t", kind="mu", inventory="small", blob=None, method=None, job_id=None, metrics={}, promote=False)
    for task_id in ("t", "queued"):
        store.create_job(task_id=task_id, method="mhr", request={})
    running = store.claim_job("w", 600)
    assert running is not None
    store.save_checkpoint(running.id, b"old checkpoint")
    store.blobs.put(b"orphan")


def jobs(store: Store) -> list[str]:
    return [job.id for job in reversed(store.list_jobs().items)]


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "add_inventory": lambda store: store.add_inventory(
        "more", b"others", tasks=[TaskSeed("b", "B", b"routing b"), TaskSeed("c", "C", b"routing c")], **SHAPE
    ),
    "put_task": lambda store: store.put_task("t", instruction="new", defaults={}, inventory=None, metadata={}),
    "register_task": lambda store: store.register_task("t", instruction="new", blob=b"new", **ADAPTER),
    "add_version": lambda store: store.add_version(
        "t", kind="adapter", inventory=None, blob=b"v", method=None, job_id=None, metrics={}, promote=True
    ),
    "promote": lambda store: store.promote("t", 2),
    "delete_task": lambda store: store.delete_task("a"),
    "claim_job": lambda store: store.claim_job("w2", 600),
    "complete_job": lambda store: store.complete_job_with_version(
        jobs(store)[RUNNING], "w", instruction="new", blob=b"learned", promote=True, metrics={}, **ADAPTER
    ),
    "request_cancel": lambda store: store.request_cancel(jobs(store)[QUEUED]),
    "save_checkpoint": lambda store: store.save_checkpoint(jobs(store)[RUNNING], b"new checkpoint"),
}


def state(store: Store) -> dict[str, Any]:
    tasks = store.list_tasks().items
    return {
        "inventories": store.list_inventories(),
        "tasks": tasks,
        "versions": [store.list_versions(task.id) for task in tasks],
        "jobs": store.list_jobs().items,
        "events": [store.list_events(job_id) for job_id in jobs(store)],
        # A finished job's checkpoint goes right after the commit, or by `gc` if a crash comes between.
        "checkpoints": [
            store.load_checkpoint(job.id) for job in store.list_jobs().items if job.status in ("queued", "running")
        ],
    }


def open_at(directory: Path) -> Store:
    return Store.open(directory, clock=lambda: NOW)


def arm(step: int) -> None:
    """Kill this process before its `step`-th step on disk."""
    taken = 0

    def count(*_: object) -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return function(*arguments, **options)

        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", count)


def survives(directory: Path, step: int, operation: Callable[[Store], object]) -> bool:
    """Whether a child that does the operation outlives the step."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arm(step)
            operation(open_at(directory))
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit("the operation failed")
    return True


def judge(directory: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    with open_at(directory) as store:
        found = state(store)
        damages = store.verify()
        store.gc(min_age_s=0)
        damages += store.verify()
    if damages:
        return f"damaged: {damages}"
    return "old" if found == old else "new" if found == new else f"neither: {found}"


def sweep(base: Path, work: Path, operation: Callable[[Store], object]) -> list[str]:
    with open_at(base) as store:
        old = state(store)
    done = work / "done"
    shutil.copytree(base, done)
    survives(done, 0, operation)
    with open_at(done) as store:
        new = state(store)
    found = []
    for step in range(1, 1000):
        copy = work / str(step)
        shutil.copytree(base, copy)
        lived = survives(copy, step, operation)
        found.append(judge(copy, old, new))
        shutil.rmtree(copy)
        if lived:
            return found
    raise SystemExit("the operation has no end")


def sweep_first_open(work: Path) -> list[str]:
    """The same for the creation of the catalog, which is never half there."""
    found = []
    for step in range(1, 1000):
        directory = work / str(step)
        lived = survives(directory, step, lambda store: None)
        with open_at(directory) as store:
            found.append("new" if state(store)["tasks"] == [] and not store.verify() else "damaged")
            fill(store)
        if lived:
            return found
    raise SystemExit("opening has no end")


def main() -> None:
    root = Path(sys.argv[1])
    print(json.dumps({"operation": "open", "found": sweep_first_open(root / "open")}), flush=True)
    base = root / "base"
    with open_at(base) as store:
        fill(store)
    for name, operation in OPERATIONS.items():
        work = root / name
        work.mkdir()
        print(json.dumps({"operation": name, "found": sweep(base, work, operation)}), flush=True)


if __name__ == "__main__":
    main()
