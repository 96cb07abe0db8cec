"""What waiting for a job means, without doing it."""

from __future__ import annotations

import time
from collections.abc import Callable

from mhr_client.errors import JobFailed, WaitTimeout
from mhr_client.types import JobInfo

ProgressCallback = Callable[[JobInfo], object]


class JobWatch:
    """Judges each look at a job: tells of progress, ends the wait, or raises."""

    def __init__(self, on_progress: ProgressCallback | None, timeout_s: float | None) -> None:
        self._on_progress = on_progress
        self._timeout_s = timeout_s
        self._started = time.monotonic()
        self._last: JobInfo | None = None

    def is_over(self, job: JobInfo) -> bool:
        """Whether the job has succeeded. Calls `on_progress` when something changed since the last look.

        Raises JobFailed when the job failed or was cancelled, and WaitTimeout when the time ran out.
        """
        if self._on_progress is not None and job != self._last:
            self._on_progress(job)
        self._last = job
        if job.status == "succeeded":
            return True
        if job.finished:
            raise JobFailed(job)
        if self._timeout_s is not None and time.monotonic() - self._started >= self._timeout_s:
            raise WaitTimeout(job, self._timeout_s)
        return False
