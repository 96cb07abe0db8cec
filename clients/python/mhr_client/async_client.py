"""The client for asyncio. Requests, parsing and retry rules live in `calls` and `transport`; here is only the I/O."""

from __future__ import annotations

from asyncio import sleep
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from mhr_client import calls
from mhr_client.errors import MHRClientError
from mhr_client.transport import (
    DEFAULT_BASE_URL,
    Call,
    EventDecoder,
    RetryPolicy,
    ServerEvent,
    connection_failed,
    error_from_answer,
    request_headers,
)
from mhr_client.types import (
    AdaptOptions,
    Example,
    Generation,
    Info,
    Inventory,
    JobEvent,
    JobInfo,
    JobStatus,
    Page,
    Parameters,
    Task,
    TaskChange,
    TaskOptions,
    Token,
)
from mhr_client.waiting import JobWatch, ProgressCallback

T = TypeVar("T")


class AsyncClient:
    """A connection to one MHR server. Safe to share between tasks of one loop; close it, or use `async with`.

    Every method raises the errors of `mhr_client.errors`. `timeout_s` bounds each wait for the server's next
    bytes. `transport` replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        retry: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retry = retry or RetryPolicy()
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=request_headers(api_key),
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            transport=transport,
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- answers ------------------------------------------------------------------------------------------------

    async def generate(
        self,
        task_id: str,
        inputs: str | Sequence[str],
        *,
        raw_prompt: bool = False,
        **parameters: Unpack[Parameters],
    ) -> Generation:
        """Answer one input or several with a task (`task`, `task@version`, `base` or `mu`)."""
        return await self._send(calls.generate(task_id, inputs, raw_prompt, stream=False, parameters=parameters))

    async def stream(
        self,
        task_id: str,
        inputs: str | Sequence[str],
        *,
        raw_prompt: bool = False,
        **parameters: Unpack[Parameters],
    ) -> AsyncGenerator[Token | Generation, None]:
        """Yield each piece of text as it comes, and the whole answer last.

        Leaving the loop early and closing the iterator stops the generation on the server.
        """
        call = calls.generate(task_id, inputs, raw_prompt, stream=True, parameters=parameters)
        async with aclosing(self._events(call)) as events:
            async for event in events:
                item = calls.stream_item(event)
                if item is not None:
                    yield item
                if isinstance(item, Generation):
                    return
        raise calls.stream_ended_early()

    # --- adaptation ---------------------------------------------------------------------------------------------

    async def adapt(self, task_id: str, examples: Iterable[Example], **options: Unpack[AdaptOptions]) -> AsyncJob:
        """Start to teach a task from examples, and return the job at once."""
        return AsyncJob(self, await self._send(calls.adapt(task_id, examples, options)))

    async def get_job(self, job_id: str) -> AsyncJob:
        """A job by its id."""
        return AsyncJob(self, await self._send(calls.get_job(job_id)))

    async def list_jobs(
        self,
        *,
        limit: int | None = None,
        cursor: str | None = None,
        status: JobStatus | None = None,
        task_id: str | None = None,
    ) -> Page[JobInfo]:
        """One page of jobs, newest first."""
        return await self._send(calls.list_jobs(limit, cursor, status, task_id))

    async def job_events(self, job_id: str, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened to a job since the event number `after`."""
        return (await self._send(calls.job_events(job_id, after))).data

    async def cancel_job(self, job_id: str) -> JobInfo:
        """Ask a job to stop. A queued one stops at once, a running one after its present step."""
        return await self._send(calls.cancel_job(job_id))

    # --- tasks --------------------------------------------------------------------------------------------------

    async def list_tasks(
        self, *, limit: int | None = None, cursor: str | None = None, prefix: str | None = None
    ) -> Page[Task]:
        """One page of tasks, ordered by id."""
        return await self._send(calls.list_tasks(limit, cursor, prefix))

    async def iter_tasks(self, *, prefix: str | None = None) -> AsyncGenerator[Task, None]:
        """Every task, ordered by id, page by page."""
        cursor: str | None = None
        while True:
            page = await self.list_tasks(cursor=cursor, prefix=prefix)
            for task in page.data:
                yield task
            cursor = page.next_cursor
            if cursor is None:
                return

    async def get_task(self, task_id: str) -> Task:
        """A task with its versions."""
        return await self._send(calls.get_task(task_id))

    async def put_task(self, task_id: str, **options: Unpack[TaskOptions]) -> Task:
        """Register a task without examples, or replace its description."""
        return await self._send(calls.put_task(task_id, options))

    async def update_task(self, task_id: str, **change: Unpack[TaskChange]) -> Task:
        """Change a task's instruction, defaults or metadata."""
        return await self._send(calls.update_task(task_id, change))

    async def delete_task(self, task_id: str) -> None:
        """Delete a task and its versions."""
        await self._send(calls.delete_task(task_id))

    async def promote(self, task_id: str, version: int) -> Task:
        """Serve this version from now on."""
        return await self._send(calls.promote(task_id, version))

    async def export_task(self, task_id: str, *, version: int | None = None) -> bytes:
        """The served (or the named) version as a PEFT LoRA checkpoint, a tar archive."""
        return await self._send(calls.export_task(task_id, version))

    # --- the server ---------------------------------------------------------------------------------------------

    async def list_inventories(self) -> tuple[Inventory, ...]:
        """Every inventory of the server."""
        return (await self._send(calls.list_inventories())).data

    async def get_inventory(self, name: str) -> Inventory:
        """An inventory with its linears and tasks."""
        return await self._send(calls.get_inventory(name))

    async def info(self) -> Info:
        """What the server runs."""
        return await self._send(calls.info())

    # --- I/O ----------------------------------------------------------------------------------------------------

    async def _send(self, call: Call[T]) -> T:
        async with self._open(call) as response:
            content = await response.aread()
        return call.parse(content)

    async def _events(self, call: Call[Any]) -> AsyncGenerator[ServerEvent, None]:
        decoder = EventDecoder()
        async with self._open(call) as response:
            async for chunk in response.aiter_bytes():
                for event in decoder.feed(chunk):
                    yield event

    @asynccontextmanager
    async def _open(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """A successful response whose body is not yet read. Raises what the last attempt ended with."""
        for attempt in count():
            error: MHRClientError
            try:
                async with self._http.stream(**call.request()) as response:
                    if response.is_success:
                        yield response
                        return
                    error = error_from_answer(response.status_code, response.headers, await response.aread())
            except httpx.TransportError as cause:
                error = connection_failed(self._http.base_url, cause)
            wait = self._retry.wait_after(attempt, error)
            if wait is None:
                raise error
            await sleep(wait)


class AsyncJob:
    """A job and the client to follow it with; `info` is its state when it was last looked at."""

    def __init__(self, client: AsyncClient, info: JobInfo) -> None:
        self._client = client
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    async def refresh(self) -> JobInfo:
        """Look at the job now."""
        self.info = (await self._client.get_job(self.id)).info
        return self.info

    async def events(self, *, after: int = 0) -> tuple[JobEvent, ...]:
        """What happened since the event number `after`."""
        return await self._client.job_events(self.id, after=after)

    async def cancel(self) -> JobInfo:
        """Ask the job to stop."""
        self.info = await self._client.cancel_job(self.id)
        return self.info

    async def wait(
        self,
        on_progress: ProgressCallback | None = None,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
    ) -> JobInfo:
        """Wait until the job has succeeded. `on_progress` gets its state whenever that changed.

        Raises JobFailed when it failed or was cancelled, WaitTimeout after `timeout_s`.
        """
        watch = JobWatch(on_progress, timeout_s)
        while not watch.is_over(await self.refresh()):
            await sleep(poll_s)
        return self.info
