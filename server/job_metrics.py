"""Metrics of jobs: they run in another process, so the server reads them from the catalog at each scrape."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

from adapters_store.errors import NotFound
from adapters_store.records import JobRecord, JobStatus
from adapters_store.store import Store
from server.metrics import Metrics

_PAGE = 200
_FINISHED = frozenset({"succeeded", "failed", "cancelled"})


class JobWatch:
    """Turns the catalog's jobs into counts and durations. Jobs finished before it began are not counted."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._lock = threading.Lock()
        self._since = datetime.now(UTC)
        self._steps: dict[str, int] = {}  # of unfinished jobs: training steps counted so far

    def update(self) -> None:
        """Look at the catalog now."""
        with self._lock:
            self._metrics.jobs(self._store.count_jobs_by_status())
            looked_at = datetime.now(UTC)
            unfinished = {job.id: job for job in [*self._list("queued"), *self._list("running")]}
            for job_id in [job_id for job_id in self._steps if job_id not in unfinished]:
                self._forget(job_id)
            for job in self._created_since(self._since):
                if job.status in _FINISHED and job.id not in self._steps:
                    self._count(job)
                    self._finish(job)
            for job in unfinished.values():
                self._count(job)
            self._since = looked_at

    def _list(self, status: JobStatus) -> list[JobRecord]:
        return self._store.list_jobs(_PAGE, None, status, None).items

    def _created_since(self, moment: datetime) -> list[JobRecord]:
        return [job for job in self._store.list_jobs(_PAGE, None, None, None).items if job.created_at >= moment]

    def _forget(self, job_id: str) -> None:
        try:
            job = self._store.get_job(job_id)
        except NotFound:
            del self._steps[job_id]
            return
        self._count(job)
        if job.status in _FINISHED:
            self._finish(job)
            del self._steps[job_id]

    def _count(self, job: JobRecord) -> None:
        # The metrics of a finished job are exact; its progress is that of its last heartbeat.
        step = int(job.metrics.get("steps") or job.progress.get("step") or 0)
        # A job that another worker took up again may begin at an earlier checkpoint.
        if job.status in _FINISHED and job.id not in self._steps:
            self._metrics.job_steps(step)
            return
        self._metrics.job_steps(max(0, step - self._steps.get(job.id, 0)))
        self._steps[job.id] = step

    def _finish(self, job: JobRecord) -> None:
        if job.started_at is not None and job.finished_at is not None:
            self._metrics.job_finished(job.method, (job.finished_at - job.started_at).total_seconds())
