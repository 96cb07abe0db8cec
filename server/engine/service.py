"""The engine behind an async front: one thread runs its steps, any event loop submits requests and reads answers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from server.engine.config import StepStats
from server.engine.engine import Engine
from server.engine.request import EngineRequest, FinishOutput, FinishReason, Output, Sequence
from server.errors import Conflict, MHRError, Unavailable

logger = logging.getLogger(__name__)


class TokenStream:
    """The outputs of one request: an async iterator whose last item is a FinishOutput.

    Leaving early, by `aclose()` or the end of an `async with` block, aborts the request. Read it in the event
    loop it was made in.
    """

    def __init__(self, request: EngineRequest, service: EngineService) -> None:
        self.request = request
        self.arrival_s = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self._service = service
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._ended = isinstance(output, FinishOutput)
        return output

    async def aclose(self) -> None:
        """Abort the request unless its last output was read."""
        if not self._ended:
            self._ended = True
            self._service.abort(self.request.id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def put(self, output: Output) -> None:
        """Hand the reader one output; called in the reader's event loop."""
        self._outputs.put_nowait(output)


class EngineService:
    """Owns the engine: after `start` only its thread touches the engine.

    `on_step` is called in that thread after every step, so it must be quick.
    """

    def __init__(self, engine: Engine, on_step: Callable[[StepStats], None] | None = None) -> None:
        self._engine = engine
        self._on_step = on_step
        self._changed = threading.Condition()  # guards everything below
        self._arrivals: deque[TokenStream] = deque()
        self._aborts: deque[str] = deque()
        self._streams: dict[str, TokenStream] = {}  # of the open requests, by id
        self._draining = False
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to run steps."""
        assert self._thread is None, "the engine service was started before"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> TokenStream:
        """Queue a request and return its stream; call it in the event loop that will read the stream.

        Raises TooLarge when the prompt does not fit the context, InvalidInput for a token id outside the
        vocabulary, Unavailable when the queue is full or the service does not run, Conflict when a request of the
        same id is open.
        """
        self._engine.check(request)
        stream = TokenStream(request, self)
        with self._changed:
            if not self.accepting:
                raise Unavailable("the server is starting or shutting down; try again later", code="draining")
            if request.id in self._streams:
                raise Conflict(f"a request with the id {request.id!r} is open; use another id", param="id")
            self._engine.scheduler.check_room(len(self._arrivals))
            self._streams[request.id] = stream
            self._arrivals.append(stream)
            self._changed.notify_all()
        return stream

    def abort(self, request_id: str) -> None:
        """End a request soon, with reason "abort"; an unknown or finished id is left alone."""
        with self._changed:
            if request_id in self._streams:
                self._aborts.append(request_id)
                self._changed.notify_all()

    @property
    def accepting(self) -> bool:
        """Whether new requests are taken: started, and neither draining nor stopped nor broken."""
        return self._thread is not None and not self._draining and not self._stopping

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_open(self) -> int:
        """Requests that have not had their last output."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return self._engine.scheduler.num_active

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._arrivals) + self._engine.scheduler.num_waiting

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes kept of earlier prompts."""
        return self._engine.prefix_cache_bytes

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuse new requests and wait for the open ones; False when some were left after `timeout_s`."""
        self._draining = True
        return await asyncio.to_thread(self._wait_until_idle, timeout_s)

    def stop(self) -> None:
        """End the thread; requests still open end with reason "abort"."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _wait_until_idle(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._streams, timeout_s)

    def _run(self) -> None:
        error: MHRError | None = None
        try:
            self._engine.prepare_thread()
            while self._wait_for_work():
                self._step()
            self._take_commands()
            self._deliver(self._engine.abort_all())
        except Exception as cause:
            logger.critical("the engine is broken and takes no more requests; restart the server", exc_info=True)
            error = MHRError(f"the engine is broken: {cause}; restart the server")
        self._end_open_streams(error)

    def _step(self) -> None:
        try:
            self._take_commands()
            outputs, stats = self._engine.step()
        except Exception as error:
            logger.exception("the engine's step failed; all its requests end with an error")
            self._deliver(self._engine.fail_all(MHRError(f"the engine failed: {error}; try again")))
            return
        self._deliver(outputs)
        if stats is not None:
            self._report(stats)

    def _report(self, stats: StepStats) -> None:
        if self._on_step is None:
            return
        try:
            self._on_step(stats)
        except Exception:
            logger.exception("the report of an engine step failed; the engine goes on")

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False when the service stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._arrivals or self._aborts or self._engine.has_work)
            return not self._stopping

    def _take_commands(self) -> None:
        with self._changed:
            arrivals, self._arrivals = self._arrivals, deque()
            aborts, self._aborts = self._aborts, deque()
        for stream in arrivals:
            self._engine.add(stream.request, stream.arrival_s)
        for request_id in aborts:
            self._engine.abort(request_id)

    def _end_open_streams(self, error: MHRError | None) -> None:
        """The last event of requests that the engine can no longer end itself."""
        with self._changed:
            self._stopping = True
            streams = list(self._streams.values())
        now_s = time.monotonic()
        reason: FinishReason = "abort" if error is None else "error"
        self._deliver([Sequence(s.request, s.arrival_s).finish(reason, now_s, error) for s in streams])

    def _deliver(self, outputs: Iterable[Output]) -> None:
        """Hand outputs to their streams, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Output]]] = {}
        with self._changed:
            for output in outputs:
                finished = isinstance(output, FinishOutput)
                stream = self._streams.pop(output.request_id) if finished else self._streams[output.request_id]
                by_loop.setdefault(stream.loop, []).append((stream, output))
            self._changed.notify_all()
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # the reader's event loop is closed: nobody reads these requests any more
                for stream, _ in pairs:
                    self.abort(stream.request.id)


def _put_all(pairs: Iterable[tuple[TokenStream, Output]]) -> None:
    for stream, output in pairs:
        stream.put(output)
