from __future__ import annotations

import pytest

from adapters_store import Conflict, InvalidValue, LeaseLost, NotFound


def create(store, task_id="t", **changes):
    fields = {"method": "mhr", "request": {"examples": [1, 2]}, "idempotency_key": None} | changes
    return store.create_job(task_id=task_id, **fields)


def types(store, job):
    return [event.type for event in store.list_events(job.id)]


def complete(store, job, worker="w", **changes):
    fields = {
        "kind": "adapter",
        "inventory": None,
        "blob": b"learned",
        "instruction": "do it",
        "defaults": {"temperature": 0.0},
        "metadata": {"by": "job"},
        "promote": True,
        "metrics": {"loss": 0.25},
    } | changes
    return store.complete_job_with_version(job.id, worker, **fields)


def test_a_job_begins_queued(store, clock):
    job, created = create(store)
    assert created
    assert job == store.get_job(job.id)
    assert job.id.startswith("job-")
    assert len(job.id) == len("job-") + 16
    assert (job.status, job.attempts, job.cancel_requested) == ("queued", 0, False)
    assert job.request == {"examples": [1, 2]}
    assert (job.progress, job.metrics, job.error, job.version, job.worker_id) == ({}, {}, None, None, None)
    assert (job.created_at, job.started_at, job.finished_at) == (clock.now, None, None)
    assert types(store, job) == ["queued"]


def test_the_same_key_and_request_give_the_first_job(store):
    first, _ = create(store, idempotency_key="k", request={"a": 1, "b": 2})
    again, created = create(store, idempotency_key="k", request={"b": 2, "a": 1})
    assert not created
    assert again == first
    assert len(store.list_jobs().items) == 1


def test_a_key_keeps_its_job_after_it_ended(store):
    first, _ = create(store, idempotency_key="k")
    store.request_cancel(first.id)
    again, created = create(store, idempotency_key="k")
    assert (again.id, again.status, created) == (first.id, "cancelled", False)


@pytest.mark.parametrize("changes", [{"request": {"a": 2}}, {"method": "lora"}, {"task_id": "other"}])
def test_a_key_used_for_another_request_is_a_conflict(store, changes):
    first, _ = create(store, idempotency_key="k", request={"a": 1})
    with pytest.raises(Conflict, match=f"used for another request .job {first.id}"):
        create(store, **({"idempotency_key": "k", "request": {"a": 1}} | changes))


def test_jobs_without_a_key_are_all_different(store):
    assert create(store)[0].id != create(store)[0].id


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"idempotency_key": "\x00"}, "idempotency_key"),
        ({"task_id": "base"}, "task_id"),
        ({"task_id": "Not An Id"}, "task_id"),
        ({"method": ""}, "method"),
        ({"request": {"bytes": b""}}, "request"),
    ],
)
def test_bad_values_are_refused(store, changes, field):
    with pytest.raises(InvalidValue) as caught:
        create(store, **changes)
    assert caught.value.field == field
    assert store.list_jobs().items == []


def test_jobs_are_claimed_oldest_first_and_once(store, clock):
    jobs = [create(store)[0] for _ in range(3)]
    claimed = [store.claim_job(f"w{number}", 30) for number in range(4)]
    assert [job and job.id for job in claimed] == [*(job.id for job in jobs), None]
    first = claimed[0]
    assert first == store.get_job(first.id)
    assert (first.status, first.worker_id, first.attempts, first.started_at) == ("running", "w0", 1, clock.now)
    event = store.list_events(first.id)[-1]
    assert (event.seq, event.type, event.data) == (2, "started", {"worker_id": "w0", "attempt": 1})


def test_a_job_whose_lease_ran_out_is_taken_over(store, clock):
    job, _ = create(store)
    store.claim_job("dead", 30)
    started = clock.now
    clock.advance(29)
    assert store.claim_job("next", 30) is None
    clock.advance(2)
    taken = store.claim_job("next", 30)
    assert (taken.id, taken.worker_id, taken.attempts, taken.started_at) == (job.id, "next", 2, started)
    assert types(store, job) == ["queued", "started", "resumed"]


def test_heartbeats_keep_the_lease(store, clock):
    job, _ = create(store)
    store.claim_job("w", 30)
    for step in range(5):
        clock.advance(20)
        record = store.heartbeat(job.id, "w", 30, {"step": step})
        assert record.progress == {"step": step}
        assert store.claim_job("other", 30) is None
    assert store.heartbeat(job.id, "w", 30, None).progress == {"step": 4}


def test_a_worker_that_was_replaced_loses_the_lease(store, clock):
    job, _ = create(store)
    store.claim_job("slow", 30)
    clock.advance(31)
    store.claim_job("next", 30)
    calls = [
        lambda: store.heartbeat(job.id, "slow", 30, None),
        lambda: store.finish_job(job.id, "slow", "failed", version=None, error="x", metrics={}),
        lambda: store.release_job(job.id, "slow"),
        lambda: complete(store, job, "slow"),
    ]
    for call in calls:
        with pytest.raises(LeaseLost, match="worker next holds it"):
            call()
    assert store.get_job(job.id).worker_id == "next"
    assert store.count_tasks() == 0


def test_a_late_heartbeat_keeps_a_lease_nobody_took(store, clock):
    job, _ = create(store)
    store.claim_job("slow", 30)
    clock.advance(100)
    assert store.heartbeat(job.id, "slow", 30, None).status == "running"
    assert store.claim_job("other", 30) is None


@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_a_finished_job_is_finished(store, clock, status):
    job, _ = create(store)
    store.claim_job("w", 30)
    clock.advance(5)
    done = store.finish_job(job.id, "w", status, version=None, error="why", metrics={"loss": 1.5})
    assert done == store.get_job(job.id)
    assert (done.status, done.error, done.metrics, done.finished_at) == (status, "why", {"loss": 1.5}, clock.now)
    assert done.worker_id is None
    event = store.list_events(job.id)[-1]
    assert (event.type, event.data) == (status, {"version": None, "error": "why"})
    clock.advance(1000)
    assert store.claim_job("other", 30) is None
    with pytest.raises(LeaseLost, match=f"it is {status}"):
        store.heartbeat(job.id, "w", 30, None)
    with pytest.raises(Conflict, match=f"{status} already"):
        store.request_cancel(job.id)


def test_a_job_ends_only_in_a_final_status(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    for status in ("running", "queued", "lost"):
        with pytest.raises(InvalidValue, match="cannot end as"):
            store.finish_job(job.id, "w", status, version=None, error=None, metrics={})


def test_completing_makes_the_task_the_version_and_the_end_in_one(store, clock):
    job, _ = create(store, task_id="new", method="mhr-z")
    store.claim_job("w", 30)
    version = complete(store, job)
    assert version == store.get_version("new")
    assert (version.number, version.method, version.job_id, version.metrics) == (1, "mhr-z", job.id, {"loss": 0.25})
    assert version.instruction == "do it"
    task = store.get_task("new")
    assert (task.instruction, task.defaults, task.metadata) == ("do it", {"temperature": 0.0}, {"by": "job"})
    done = store.get_job(job.id)
    assert (done.status, done.version, done.metrics, done.finished_at) == ("succeeded", 1, {"loss": 0.25}, clock.now)
    assert types(store, job)[-1] == "succeeded"


def test_completing_without_promotion_changes_nothing_of_what_is_served(store):
    store.register_task(
        "t", instruction="old", defaults={}, inventory=None, metadata={"mine": 1}, kind="adapter", blob=b"old"
    )
    job, _ = create(store)
    store.claim_job("w", 30)
    before = store.get_task("t")
    assert complete(store, job, promote=False).number == 2
    assert store.get_task("t") == before
    assert store.promote("t", 2).instruction == "do it"


def test_completing_with_promotion_keeps_the_tasks_own_defaults(store):
    store.register_task(
        "t", instruction="old", defaults={"seed": 1}, inventory=None, metadata={"mine": 1}, kind="adapter", blob=b"old"
    )
    job, _ = create(store)
    store.claim_job("w", 30)
    complete(store, job)
    task = store.get_task("t")
    assert (task.served_version, task.instruction) == (2, "do it")
    assert (task.defaults, task.metadata) == ({"seed": 1}, {"mine": 1})


def test_completing_a_new_task_without_promotion_leaves_it_unserved(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    complete(store, job, promote=False)
    assert store.get_task("t").served_version is None


def test_completing_with_what_cannot_be_kept_leaves_the_job_running(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    with pytest.raises(NotFound, match="no inventory"):
        complete(store, job, kind="routing", inventory="nowhere")
    assert store.get_job(job.id).status == "running"
    assert store.count_tasks() == 0


def test_a_released_job_waits_in_its_old_place_and_keeps_its_checkpoint(store):
    first, second = create(store)[0], create(store)[0]
    store.claim_job("w", 30)
    store.save_checkpoint(first.id, b"half way")
    released = store.release_job(first.id, "w")
    assert (released.status, released.worker_id, released.attempts) == ("queued", None, 0)
    assert store.load_checkpoint(first.id) == b"half way"
    assert store.claim_job("next", 30).id == first.id
    assert store.claim_job("next", 30).id == second.id
    assert types(store, first) == ["queued", "started", "released", "resumed"]


def test_a_queued_job_is_cancelled_at_once(store, clock):
    job, _ = create(store)
    cancelled = store.request_cancel(job.id)
    assert (cancelled.status, cancelled.finished_at) == ("cancelled", clock.now)
    assert types(store, job) == ["queued", "cancelled"]
    assert store.claim_job("w", 30) is None


def test_the_worker_of_a_running_job_learns_of_a_cancel_by_its_heartbeat(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    assert not store.heartbeat(job.id, "w", 30, None).cancel_requested
    asked = store.request_cancel(job.id)
    assert (asked.status, asked.cancel_requested) == ("running", True)
    store.request_cancel(job.id)
    assert store.heartbeat(job.id, "w", 30, None).cancel_requested
    store.finish_job(job.id, "w", "cancelled", version=None, error=None, metrics={})
    assert types(store, job) == ["queued", "started", "cancel_requested", "cancelled"]


def test_a_release_after_a_cancel_does_not_queue_the_job_again(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    store.request_cancel(job.id)
    assert store.release_job(job.id, "w").status == "cancelled"
    assert store.claim_job("w", 30) is None


def test_events_count_up_and_can_be_read_from_a_point(store, clock):
    job, _ = create(store)
    clock.advance(1)
    event = store.append_event(job.id, "epoch", {"loss": float("nan"), "n": 1})
    assert event == store.list_events(job.id)[-1]
    assert (event.seq, event.type, event.data, event.created_at) == (2, "epoch", {"loss": None, "n": 1}, clock.now)
    store.append_event(job.id, "epoch", {})
    assert [event.seq for event in store.list_events(job.id)] == [1, 2, 3]
    assert [event.seq for event in store.list_events(job.id, after=2)] == [3]
    assert store.list_events(job.id, after=10**30) == []


def test_an_event_needs_a_plain_type(store):
    job, _ = create(store)
    for bad in ("", "Two Words", "t" * 65):
        with pytest.raises(InvalidValue, match="no type of event"):
            store.append_event(job.id, bad, {})


@pytest.mark.parametrize("job_id", ["job-0123456789abcdef", "", "../x", "job-\x00"])
def test_an_unknown_job_is_not_found(store, job_id):
    calls = [
        lambda: store.get_job(job_id),
        lambda: store.list_events(job_id),
        lambda: store.append_event(job_id, "x", {}),
        lambda: store.request_cancel(job_id),
        lambda: store.heartbeat(job_id, "w", 1, None),
        lambda: store.release_job(job_id, "w"),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="there is no job"):
            call()


def test_jobs_are_listed_newest_first_by_page(store):
    ids = [create(store)[0].id for _ in range(7)]
    first = store.list_jobs(3)
    second = store.list_jobs(3, first.next_cursor)
    create(store)
    third = store.list_jobs(3, second.next_cursor)
    assert [job.id for page in (first, second, third) for job in page.items] == ids[::-1]
    assert third.next_cursor is None


def test_jobs_are_filtered_by_status_and_task(store):
    a, _ = create(store, task_id="a")
    b, _ = create(store, task_id="b")
    store.claim_job("w", 30)
    assert [job.id for job in store.list_jobs(status="running").items] == [a.id]
    assert [job.id for job in store.list_jobs(task_id="b").items] == [b.id]
    assert store.list_jobs(status="running", task_id="b").items == []
    assert store.list_jobs(task_id="No Such Id").items == []
    with pytest.raises(InvalidValue, match="no status"):
        store.list_jobs(status="lost")


@pytest.mark.parametrize("cursor", ["x", "", "-1", "1" * 19, "²"])
def test_a_cursor_that_is_none_is_refused(store, cursor):
    with pytest.raises(InvalidValue, match="not a cursor"):
        store.list_jobs(10, cursor)


def test_jobs_are_counted_by_status(store):
    for _ in range(3):
        create(store)
    store.claim_job("w", 30)
    assert store.count_jobs_by_status() == {"queued": 2, "running": 1, "succeeded": 0, "failed": 0, "cancelled": 0}


def test_the_checkpoint_goes_with_the_job(store):
    endings = {
        "completed": lambda job: complete(store, job),
        "failed": lambda job: store.finish_job(job.id, "w", "failed", error="x"),
        "cancelled at release": lambda job: (store.request_cancel(job.id), store.release_job(job.id, "w")),
        "cancelled in the queue": lambda job: (store.release_job(job.id, "w"), store.request_cancel(job.id)),
    }
    for name, end in endings.items():
        job, _ = create(store)
        store.claim_job("w", 30)
        store.save_checkpoint(job.id, b"half way")
        end(job)
        assert store.load_checkpoint(job.id) is None, name


def test_an_error_that_no_database_keeps_is_kept_in_substance(store):
    job, _ = create(store)
    store.claim_job("w", 30)
    done = store.finish_job(job.id, "w", "failed", error="bad byte \x00 and half \ud800 a pair")
    assert done.error == "bad byte \ufffd and half ? a pair"
    assert store.get_job(job.id) == done


def test_checkpoints_are_replaced_and_deleted(store):
    job, _ = create(store)
    assert store.load_checkpoint(job.id) is None
    store.save_checkpoint(job.id, b"one")
    store.save_checkpoint(job.id, b"")
    assert store.load_checkpoint(job.id) == b""
    store.delete_checkpoint(job.id)
    store.delete_checkpoint(job.id)
    assert store.load_checkpoint(job.id) is None
