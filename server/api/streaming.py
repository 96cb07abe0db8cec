"""Server-sent events, and the one place where a client that goes away ends its work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent

from server.api import errors

T = TypeVar("T")
# An idle stream says so this often, so that proxies keep it open.
_PING_S = 15


class ClientGone(Exception):
    """The client closed the connection before its answer was ready."""


def event(name: str, data: BaseModel | dict[str, object], event_id: int | None = None) -> ServerSentEvent:
    """One event whose data is one line of JSON."""
    text = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data, ensure_ascii=False)
    return ServerSentEvent(data=text, event=name, id=None if event_id is None else str(event_id), sep="\n")


def event_stream(events: AsyncIterator[ServerSentEvent], *, grace_s: float = 0.0) -> EventSourceResponse:
    """The response of a stream; a stopping server lets it go on for `grace_s`."""
    return EventSourceResponse(
        events, ping=_PING_S, sep="\n", headers={"Cache-Control": "no-cache"}, shutdown_grace_period=grace_s
    )


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first. Raises ClientGone then."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        await cancel(working)


async def stream_answer(
    request: Request,
    start: Callable[[Callable[[ServerSentEvent], None]], Awaitable[BaseModel]],
    *,
    grace_s: float,
) -> EventSourceResponse:
    """Stream what `start(emit)` emits, then `done` with its result, or `error`.

    The status line waits for the first event, so that a request refused at once gets its own status.
    """
    queue: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue()

    async def work() -> None:
        try:
            queue.put_nowait(event("done", await start(queue.put_nowait)))
        finally:
            queue.put_nowait(None)

    working = asyncio.create_task(work())
    try:
        first = await until_gone(request, queue.get())
    except BaseException:
        await cancel(working)
        raise
    if first is None:
        await working  # raises what went wrong

    async def events() -> AsyncIterator[ServerSentEvent]:
        item = first
        try:
            while item is not None:
                yield item
                item = await queue.get()
            try:
                await working
            except Exception as error:
                known = errors.to_error(error)
                errors.note(request.state, known, error)
                yield event("error", errors.body(known))
        finally:
            if not working.done():
                request.state.outcome = "cancelled"
            await cancel(working)

    return event_stream(events(), grace_s=grace_s)


async def cancel(task: asyncio.Future[T]) -> None:
    """Cancel a task and wait until it is over; its own error is nobody's concern any more."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(request: Request) -> None:
    """Return when the client is gone. The body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
