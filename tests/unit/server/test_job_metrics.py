from __future__ import annotations

from adapters_store.store import Store
from server.job_metrics import JobWatch
from server.metrics import Metrics


def queue(store: Store, task: str = "t") -> str:
    job, _ = store.create_job(task_id=task, method="mhr-z", request={})
    return job.id


def take(store: Store) -> str:
    job = store.claim_job("w", 30.0)
    assert job is not None
    return job.id


def value(metrics: Metrics, name: str) -> float:
    [line] = [line for line in metrics.render().decode().splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


def test_steps_and_durations_are_counted_once(store: Store) -> None:
    metrics = Metrics()
    watch = JobWatch(store, metrics)
    queue(store)
    job = take(store)
    for step in (3, 3, 8):
        store.heartbeat(job, "w", 30.0, {"step": step})
        watch.update()
    assert value(metrics, "mhr_adapt_steps_total") == 8
    assert value(metrics, 'mhr_adapt_jobs{status="running"}') == 1
    store.finish_job(job, "w", "succeeded", metrics={"steps": 12})
    for _ in range(3):
        watch.update()
    assert value(metrics, "mhr_adapt_steps_total") == 12
    assert value(metrics, 'mhr_adapt_job_duration_seconds_count{method="mhr-z"}') == 1
    assert value(metrics, 'mhr_adapt_jobs{status="succeeded"}') == 1


def test_a_job_that_came_and_went_between_two_looks_counts(store: Store) -> None:
    metrics = Metrics()
    watch = JobWatch(store, metrics)
    watch.update()
    queue(store)
    store.finish_job(take(store), "w", "failed", error="e", metrics={"steps": 2})
    for _ in range(2):
        watch.update()
    assert value(metrics, "mhr_adapt_steps_total") == 2
    assert value(metrics, 'mhr_adapt_job_duration_seconds_count{method="mhr-z"}') == 1


def test_jobs_of_an_earlier_life_do_not_count(store: Store) -> None:
    queue(store)
    store.finish_job(take(store), "w", "succeeded", metrics={"steps": 9})
    metrics = Metrics()
    watch = JobWatch(store, metrics)
    watch.update()
    assert value(metrics, "mhr_adapt_steps_total") == 0
    assert value(metrics, 'mhr_adapt_jobs{status="succeeded"}') == 1


def test_steps_done_again_after_a_crash_are_not_taken_back(store: Store) -> None:
    metrics = Metrics()
    watch = JobWatch(store, metrics)
    queue(store)
    job = take(store)
    for step in (10, 5, 11):
        store.heartbeat(job, "w", 30.0, {"step": step})
        watch.update()
    assert value(metrics, "mhr_adapt_steps_total") >= 11
