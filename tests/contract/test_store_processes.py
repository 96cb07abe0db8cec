"""Several processes, and many threads, on one store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapters_store import CatalogUnavailable, DataDirInUse, DataDirLock, Store, database

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("store_child.py")


def start(place, command, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, str(CHILD), command, str(place.data_dir), place.database_url or "", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run_together(children):
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return [child.communicate(timeout=60)[0].split() for child in children]


def test_two_processes_never_claim_the_same_job(place, store):
    ids = [store.create_job(task_id="t", method="mhr", request={})[0].id for _ in range(60)]
    children = [start(place, "claim", f"worker-{number}") for number in range(2)]
    claimed = run_together(children)
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(claimed[0] + claimed[1]) == sorted(ids)
    for number, own in enumerate(claimed):
        assert {store.get_job(job_id).worker_id for job_id in own} <= {f"worker-{number}"}
    assert {store.get_job(job_id).attempts for job_id in ids} == {1}


def test_processes_that_create_the_catalog_together_agree(place):
    children = [start(place, "open") for _ in range(4)]
    assert run_together(children) == [["open"]] * 4
    with Store.open(place.data_dir, place.database_url) as store:
        assert store.count_tasks() == 0


@pytest.mark.parametrize("existing", [False, True])
def test_a_process_killed_between_blob_and_commit_leaves_the_old_state(place, open_store, existing):
    store = open_store()
    if existing:
        store.register_task(
            "t", instruction="old", defaults={}, inventory=None, metadata={}, kind="adapter", blob=b"old"
        )
    child = start(place, "die-before-commit")
    run_together([child])
    assert child.returncode == -signal.SIGKILL

    after = open_store()
    assert after.count_tasks() == int(existing)
    if existing:
        assert after.get_task("t").instruction == "old"
        assert [version.number for version in after.list_versions("t")] == [1]
    assert after.verify() == []
    # The new blob was durable before the commit; nothing names it, so it is an orphan.
    assert after.gc(min_age_s=0).blobs == 1
    assert after.verify() == []
    new = after.register_task(
        "t", instruction="new", defaults={}, inventory=None, metadata={}, kind="adapter", blob=b"new"
    )
    assert new.number == 1 + int(existing)


def test_a_second_server_is_refused_with_the_first_ones_pid_until_it_dies(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(CHILD), "hold-lock", str(tmp_path), ""], stdout=subprocess.PIPE, text=True, env=environment
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataDirInUse, match=f"in use by process {holder.pid}"):
            DataDirLock(tmp_path).acquire()
        holder.kill()
    with DataDirLock(tmp_path):
        pass


def test_threads_lose_no_version_no_event_and_no_job(store):
    store.put_task("t", instruction="", defaults={}, inventory=None, metadata={})
    job, _ = store.create_job(task_id="other", method="mhr", request={})

    def work(number):
        version = store.add_version(
            "t",
            kind="adapter",
            inventory=None,
            blob=b"%d" % (number % 7),
            method=None,
            job_id=None,
            metrics={},
            promote=True,
        )
        event = store.append_event(job.id, "tick", {"number": number})
        created, _ = store.create_job(task_id="t", method="mhr", request={}, idempotency_key=f"key-{number % 5}")
        assert store.get_task("t").served_version is not None
        return version.number, event.seq, created.id

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(work, range(60)))
    assert sorted(version for version, _, _ in results) == list(range(1, 61))
    assert sorted(seq for _, seq, _ in results) == list(range(2, 62))
    assert sorted(Counter(job_id for _, _, job_id in results).values()) == [12] * 5
    assert store.verify() == []


def test_a_write_lock_that_never_comes_free_is_told(place, open_store, monkeypatch):
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.1)
    store, other = open_store(), open_store()
    with other._database.write() as session:
        session.connection()
        with pytest.raises(CatalogUnavailable, match="Another process holds it for long"):
            store.put_task("t", instruction="", defaults={}, inventory=None, metadata={})
    store.put_task("t", instruction="", defaults={}, inventory=None, metadata={})


def test_readers_go_on_while_a_writer_holds_the_lock(store, open_store):
    store.put_task("t", instruction="old", defaults={}, inventory=None, metadata={})
    other = open_store()
    with store._database.write() as session:
        session.connection()
        assert other.get_task("t").instruction == "old"
        assert store.get_task("t").instruction == "old"
