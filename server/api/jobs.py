"""/jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import Response
from sse_starlette import ServerSentEvent

from adapters_store.records import JobEvent, JobRecord
from adapters_store.store import Store
from server.api import schemas, views
from server.api.deps import RuntimeDep, require_key
from server.api.docs import ERRORS
from server.api.streaming import event, event_stream

router = APIRouter(tags=["jobs"], dependencies=[Depends(require_key)])
_FINISHED = frozenset({"succeeded", "failed", "cancelled"})
_POLL_S = 0.25


@router.get("/jobs", response_model=views.JobPage, responses=ERRORS)
def list_jobs(query: Annotated[schemas.JobQuery, Query()], runtime: RuntimeDep) -> views.JobPage:
    """Jobs, newest first."""
    page = runtime.store.list_jobs(query.limit, query.cursor, query.status, query.task_id)
    return views.JobPage(data=[job_view(job) for job in page.items], next_cursor=page.next_cursor)


@router.get("/jobs/{job_id}", response_model=views.JobView, responses=ERRORS)
def get_job(job_id: str, runtime: RuntimeDep) -> views.JobView:
    """One job: its progress, its metrics, the version it made, the reason of its failure."""
    return job_view(runtime.store.get_job(job_id))


@router.post("/jobs/{job_id}/cancel", response_model=views.JobView, responses=ERRORS)
def cancel_job(job_id: str, runtime: RuntimeDep) -> views.JobView:
    """Cancel a job: a queued one at once, a running one after its present step."""
    return job_view(runtime.store.request_cancel(job_id))


@router.get(
    "/jobs/{job_id}/events",
    response_model=views.EventPage,
    responses={
        200: {
            "description": "The events; with `Accept: text/event-stream`, a stream that ends with the job",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **ERRORS,
    },
)
async def job_events(
    job_id: str,
    query: Annotated[schemas.EventQuery, Query()],
    request: Request,
    runtime: RuntimeDep,
    accept: Annotated[str, Header()] = "application/json",
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,9}$")] = None,
) -> views.EventPage | Response:
    """What happened to a job, oldest first."""
    after = max(query.after, int(last_event_id or 0))
    await asyncio.to_thread(runtime.store.get_job, job_id)
    if "text/event-stream" in accept:
        return event_stream(_follow(runtime.store, job_id, after))
    events = await asyncio.to_thread(runtime.store.list_events, job_id, after)
    return views.EventPage(data=[_view(item) for item in events])


async def _follow(store: Store, job_id: str, after: int) -> AsyncIterator[ServerSentEvent]:
    """Events as they come, until the job is finished."""
    while True:
        job = await asyncio.to_thread(store.get_job, job_id)
        for item in await asyncio.to_thread(store.list_events, job_id, after):
            after = item.seq
            yield event(item.type, _view(item), item.seq)
        if job.status in _FINISHED:
            return
        await asyncio.sleep(_POLL_S)


def job_view(job: JobRecord) -> views.JobView:
    """A job without its examples."""
    return views.JobView(
        id=job.id,
        task_id=job.task_id,
        method=job.method,
        status=job.status,
        version=job.version,
        progress=job.progress,
        metrics=job.metrics,
        error=job.error,
        attempts=job.attempts,
        cancel_requested=job.cancel_requested,
        inventory=job.request["inventory"],
        promote=job.request["promote"],
        num_examples=len(job.request["examples"]),
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
    )


def _view(item: JobEvent) -> views.EventView:
    return views.EventView.model_validate(item)
