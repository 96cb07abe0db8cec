"""POST /adapt."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response

from server.api import schemas, views
from server.api.deps import AcceptingDep, require_key
from server.api.docs import ERRORS
from server.api.jobs import job_view

router = APIRouter(tags=["adapt"], dependencies=[Depends(require_key)])


@router.post(
    "/adapt",
    status_code=202,
    response_model=views.JobView,
    responses={
        202: {"headers": {"Location": {"description": "The job's path", "schema": {"type": "string"}}}},
        **ERRORS,
    },
)
def adapt(
    body: schemas.AdaptRequest,
    request: Request,
    response: Response,
    services: AcceptingDep,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, description="A repeated call with the same key returns the first job"),
    ] = None,
) -> views.JobView:
    """Queue a job that learns a task from examples. Follow it at the `Location`."""
    asked = body.model_dump() | {"hyperparameters": body.hyperparameters.model_dump(exclude_unset=True)}
    job, _ = services.adaptation.submit(asked, idempotency_key)
    request.state.task = job.task_id
    response.headers["Location"] = f"/jobs/{job.id}"
    return job_view(job)
