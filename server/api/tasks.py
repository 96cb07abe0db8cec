"""/tasks."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from adapters_store.records import TaskRecord
from adapters_store.store import Store
from server.api import schemas, views
from server.api.deps import AcceptingDep, RuntimeDep, ServicesDep, require_key
from server.api.docs import ERRORS
from server.tasks import check_not_reserved

router = APIRouter(tags=["tasks"], dependencies=[Depends(require_key)])


def _new_id(task_id: Annotated[str, Path(pattern=schemas.TASK_ID)]) -> str:
    """A task id that a caller may write to."""
    check_not_reserved(task_id)
    return task_id


WritableId = Annotated[str, Depends(_new_id)]


@router.get("/tasks", response_model=views.TaskPage, responses=ERRORS)
def list_tasks(query: Annotated[schemas.TaskQuery, Query()], runtime: RuntimeDep) -> views.TaskPage:
    """Tasks, ordered by id. `base` and `mu` are always there and not listed."""
    page = runtime.store.list_tasks(query.limit, query.cursor, query.prefix)
    data = [views.TaskView.model_validate(task) for task in page.items]
    return views.TaskPage(data=data, next_cursor=page.next_cursor)


@router.get("/tasks/{task_id}", response_model=views.TaskDetail, responses=ERRORS)
def get_task(task_id: str, runtime: RuntimeDep) -> views.TaskDetail:
    """One task with its versions, oldest first."""
    return _detail(runtime.store, runtime.store.get_task(task_id))


@router.put(
    "/tasks/{task_id}",
    response_model=views.TaskDetail,
    responses={201: {"model": views.TaskDetail, "description": "The task is new"}, **ERRORS},
)
def put_task(
    task_id: WritableId,
    body: schemas.TaskPut,
    request: Request,
    response: Response,
    services: AcceptingDep,
    runtime: RuntimeDep,
) -> views.TaskDetail:
    """Register a task without examples: the inventory's mean, or a routing of your own. Replaces a task of that id."""
    task, created = services.catalog.register(
        task_id,
        instruction=body.instruction,
        defaults=body.defaults.model_dump(exclude_none=True),
        metadata=body.metadata,
        inventory=body.inventory,
        routing=body.routing,
    )
    request.state.task = task.id
    response.status_code = 201 if created else 200
    return _detail(runtime.store, task)


@router.patch("/tasks/{task_id}", response_model=views.TaskDetail, responses=ERRORS)
def patch_task(
    task_id: WritableId, body: schemas.TaskPatch, services: ServicesDep, runtime: RuntimeDep
) -> views.TaskDetail:
    """Change a task's instruction, generation defaults or metadata; each that is sent replaces the old one."""
    task = services.catalog.change(
        task_id,
        instruction=body.instruction,
        defaults=None if body.defaults is None else body.defaults.model_dump(exclude_none=True),
        metadata=body.metadata,
    )
    return _detail(runtime.store, task)


@router.delete("/tasks/{task_id}", status_code=204, response_class=Response, responses=ERRORS)
def delete_task(task_id: WritableId, runtime: RuntimeDep) -> None:
    """Delete a task and its versions. Requests in flight finish."""
    runtime.store.delete_task(task_id)


@router.post("/tasks/{task_id}/promote", response_model=views.TaskDetail, responses=ERRORS)
def promote_task(task_id: WritableId, body: schemas.Promotion, runtime: RuntimeDep) -> views.TaskDetail:
    """Serve this version from now on. Requests in flight finish on the version they began with."""
    return _detail(runtime.store, runtime.store.promote(task_id, body.version))


@router.get(
    "/tasks/{task_id}/export",
    response_class=Response,
    responses={
        200: {
            "description": "A PEFT LoRA checkpoint",
            "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
        },
        **ERRORS,
    },
)
async def export_task(task_id: str, query: Annotated[schemas.ExportQuery, Query()], services: ServicesDep) -> Response:
    """A task (or `mu`) as a PEFT LoRA checkpoint, a tar archive of a directory named after it."""
    reference = task_id if query.version is None else f"{task_id}@{query.version}"
    archive = await asyncio.to_thread(services.exporter.export, reference)
    headers = {"Content-Disposition": f'attachment; filename="{archive.name}.tar"'}
    return Response(archive.content, media_type="application/x-tar", headers=headers)


def _detail(store: Store, task: TaskRecord) -> views.TaskDetail:
    versions = [views.VersionView.model_validate(version) for version in store.list_versions(task.id)]
    return views.TaskDetail(**vars(views.TaskView.model_validate(task)), versions=versions)
