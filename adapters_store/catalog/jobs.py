"""Jobs and their events in the catalog: a queue with leases.

A worker that claims a job holds it until its lease runs out; heartbeats renew the lease. A running job whose
lease ran out is claimed like a queued one: its worker died, and the next goes on from the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from adapters_store.errors import Conflict, InvalidValue, LeaseLost, NotFound
from adapters_store.models import EventRow, JobRow
from adapters_store.records import JobRecord, JobStatus, Json, Page
from adapters_store.values import JOB_ID, MAX_INTEGER, TASK_ID, canonical_json, new_job_id

STATUSES: tuple[JobStatus, ...] = ("queued", "running", "succeeded", "failed", "cancelled")
FINISHED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")
_EVENT_TYPE = re.compile(r"[a-z0-9._-]{1,64}")


def get_job(session: Session, job_id: str) -> JobRow:
    """Raises NotFound."""
    row = session.scalar(select(JobRow).where(JobRow.id == job_id)) if JOB_ID.fullmatch(job_id) else None
    if row is None:
        raise NotFound(f"there is no job {job_id!r}; `mhr jobs list` shows those there are.")
    return row


def create_job(
    session: Session, task_id: str, method: str, request: Json, idempotency_key: str | None, now: datetime
) -> tuple[JobRow, bool]:
    """Queue a job; or the job of the same key and request, and False. Raises Conflict for another request."""
    if idempotency_key is not None:
        known = session.scalar(select(JobRow).where(JobRow.idempotency_key == idempotency_key))
        if known is not None:
            if _same_request(known, task_id, method, request):
                return known, False
            raise Conflict(
                f"the idempotency key {idempotency_key!r} was used for another request (job {known.id}); "
                "send this one with a new key."
            )
    row = JobRow(
        id=new_job_id(),
        task_id=task_id,
        method=method,
        status="queued",
        request=request,
        idempotency_key=idempotency_key,
        progress={},
        metrics={},
        attempts=0,
        cancel_requested=False,
        last_event=0,
        created_at=now,
    )
    session.add(row)
    session.flush()
    append_event(session, row, "queued", {}, now)
    return row, True


def list_jobs(
    session: Session, limit: int, cursor: str | None, status: JobStatus | None, task_id: str | None
) -> Page[JobRecord]:
    """Jobs, newest first, after the cursor."""
    query = select(JobRow).order_by(JobRow.seq.desc()).limit(limit + 1)
    if cursor is not None:
        query = query.where(JobRow.seq < _position(cursor))
    if status is not None:
        if status not in STATUSES:
            raise InvalidValue("status", f"{status!r} is no status of a job; use {', '.join(STATUSES)}.")
        query = query.where(JobRow.status == status)
    if task_id is not None:
        if TASK_ID.fullmatch(task_id) is None:
            return Page([], None)
        query = query.where(JobRow.task_id == task_id)
    rows = session.scalars(query).all()
    next_cursor = str(rows[limit - 1].seq) if len(rows) > limit else None
    return Page([row.record() for row in rows[:limit]], next_cursor)


def count_by_status(session: Session) -> dict[str, int]:
    """The number of jobs in each status, zeros included."""
    counted = {
        row.status: row.number
        for row in session.execute(select(JobRow.status, func.count().label("number")).group_by(JobRow.status))
    }
    return {status: counted.get(status, 0) for status in STATUSES}


def active_job(session: Session, task_id: str) -> JobRow | None:
    """A job that is queued or running for the task, if there is one."""
    query = select(JobRow).where(JobRow.task_id == task_id, JobRow.status.in_(("queued", "running")))
    return session.scalars(query.order_by(JobRow.seq).limit(1)).first()


def next_job(session: Session, now: datetime) -> JobRow | None:
    """The oldest job that nobody works on."""
    abandoned = and_(JobRow.status == "running", JobRow.lease_expires_at < now)
    query = select(JobRow).where(or_(JobRow.status == "queued", abandoned)).order_by(JobRow.seq).limit(1)
    return session.scalars(query).first()


def claim(session: Session, worker_id: str, lease_s: float, now: datetime) -> JobRow | None:
    """Give the worker the oldest job that nobody works on."""
    row = next_job(session, now)
    if row is None:
        return None
    row.status = "running"
    row.worker_id = worker_id
    row.lease_expires_at = now + timedelta(seconds=lease_s)
    row.attempts += 1
    event = "started" if row.started_at is None else "resumed"
    row.started_at = row.started_at or now
    append_event(session, row, event, {"worker_id": worker_id, "attempt": row.attempts}, now)
    return row


def held_job(session: Session, job_id: str, worker_id: str) -> JobRow:
    """The job, if this worker holds it. Raises NotFound or LeaseLost."""
    row = get_job(session, job_id)
    if row.status != "running" or row.worker_id != worker_id:
        holder = f"worker {row.worker_id} holds it" if row.status == "running" else f"it is {row.status}"
        raise LeaseLost(f"worker {worker_id} no longer holds job {job_id}: {holder}. Stop working on it.")
    return row


def renew(row: JobRow, lease_s: float, progress: Json | None, now: datetime) -> None:
    """Extend the lease from now, and note the progress if there is any."""
    row.lease_expires_at = now + timedelta(seconds=lease_s)
    if progress is not None:
        row.progress = progress


def check_finished(status: JobStatus) -> None:
    """Raise InvalidValue unless a job can end in this status."""
    if status not in FINISHED:
        raise InvalidValue("status", f"a job cannot end as {status!r}; use {', '.join(FINISHED)}.")


def check_event_type(event_type: str) -> None:
    """Raise InvalidValue unless the type is short and plain."""
    if _EVENT_TYPE.fullmatch(event_type) is None:
        raise InvalidValue("type", f"{event_type!r} is no type of event; use 1 to 64 of a-z, 0-9, '.', '_' and '-'.")


def finish(
    session: Session,
    row: JobRow,
    status: JobStatus,
    version: int | None,
    error: str | None,
    metrics: Json,
    now: datetime,
) -> None:
    """End the job; the event that carries the status is its last one."""
    row.status, row.version, row.error, row.metrics = status, version, error, metrics
    row.worker_id, row.lease_expires_at = None, None
    row.finished_at = now
    append_event(session, row, status, {"version": version, "error": error}, now)


def release(session: Session, row: JobRow, now: datetime) -> None:
    """Put the job back into the queue, in its old place; an attempt that ends so does not count."""
    if row.cancel_requested:
        finish(session, row, "cancelled", None, None, row.metrics, now)
        return
    worker_id = row.worker_id
    row.status, row.worker_id, row.lease_expires_at = "queued", None, None
    row.attempts -= 1
    append_event(session, row, "released", {"worker_id": worker_id}, now)


def request_cancel(session: Session, row: JobRow, now: datetime) -> None:
    """Cancel a queued job at once; ask the worker of a running one to stop. Raises Conflict when it is finished."""
    if row.status in FINISHED:
        raise Conflict(f"job {row.id} is {row.status} already and cannot be cancelled.")
    if row.cancel_requested:
        return
    row.cancel_requested = True
    if row.status == "queued":
        finish(session, row, "cancelled", None, None, row.metrics, now)
    else:
        append_event(session, row, "cancel_requested", {}, now)


def append_event(session: Session, row: JobRow, event_type: str, data: Json, now: datetime) -> EventRow:
    """Add the job's next event."""
    row.last_event += 1
    event = EventRow(job_id=row.id, seq=row.last_event, type=event_type, data=data, created_at=now)
    session.add(event)
    return event


def list_events(session: Session, row: JobRow, after: int) -> Sequence[EventRow]:
    """The job's events with a seq greater than `after`, in order."""
    query = select(EventRow).where(EventRow.job_id == row.id, EventRow.seq > min(after, MAX_INTEGER))
    return session.scalars(query.order_by(EventRow.seq)).all()


def unfinished_ids(session: Session) -> set[str]:
    """The ids of all jobs that are queued or running."""
    return set(session.scalars(select(JobRow.id).where(JobRow.status.in_(("queued", "running")))))


def _same_request(row: JobRow, task_id: str, method: str, request: Json) -> bool:
    asked = (task_id, method, canonical_json(request))
    return asked == (row.task_id, row.method, canonical_json(row.request))


def _position(cursor: str) -> int:
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 18:
        raise InvalidValue(
            "cursor", f"{cursor!r} is not a cursor of the list of jobs; use the last page's next_cursor."
        )
    return int(cursor)
