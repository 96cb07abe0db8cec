"""POST /generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from server.api import schemas, views
from server.api.deps import AcceptingDep, RuntimeDep, require_key
from server.api.docs import ERRORS
from server.api.streaming import ClientGone, event, stream_answer, until_gone
from server.generation import GenerationCall
from server.runtime import Runtime, Services

router = APIRouter(tags=["generate"], dependencies=[Depends(require_key)])
# What nginx logs for a client that closed the connection; nobody receives it.
_CLIENT_CLOSED = 499

_STREAM_DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": views.GenerateAnswer,
        "description": "The answer; with `stream`, events `token`, then one `done` or one `error`",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/generate", response_model=views.GenerateAnswer, responses={**_STREAM_DOCS, **ERRORS})
async def generate(
    body: schemas.GenerateRequest, request: Request, services: AcceptingDep, runtime: RuntimeDep
) -> views.GenerateAnswer | Response:
    """Answer one input or several with a task."""
    call = GenerationCall(
        reference=body.task_id,
        inputs=tuple(body.inputs),
        options=body.parameters.model_dump(exclude_none=True),
        raw_prompt=body.raw_prompt,
    )
    try:
        if body.stream:
            return await _stream(call, request, services, runtime)
        answer = await until_gone(request, services.generation.answer(call, on_task=_task_noter(request)))
    except ClientGone:
        request.state.outcome = "cancelled"
        return Response(status_code=_CLIENT_CLOSED)
    return views.GenerateAnswer.model_validate(answer)


async def _stream(call: GenerationCall, request: Request, services: Services, runtime: Runtime) -> EventSourceResponse:
    async def start(emit: Callable[[ServerSentEvent], None]) -> views.GenerateAnswer:
        answer = await services.generation.answer(
            call,
            on_text=lambda index, text: emit(event("token", {"index": index, "text": text})),
            on_task=_task_noter(request),
        )
        return views.GenerateAnswer.model_validate(answer)

    return await stream_answer(request, start, grace_s=runtime.settings.drain_timeout_s)


def _task_noter(request: Request) -> Callable[[str], None]:
    """Leaves the task, once it is known to exist, for the log and the metrics."""
    return lambda task_id: setattr(request.state, "task", task_id)
