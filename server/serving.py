"""One server process from start to end: uvicorn around the application, draining on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import uvicorn

from server.app import create_app
from server.logs import get_logger
from server.runtime import Runtime
from server.settings import Settings

log = get_logger(__name__)


class DrainingServer(uvicorn.Server):
    """Drains on the first signal, while /readyz says so; ends at once on the second."""

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for sock in server.sockets:
                host, port = sock.getsockname()[:2]
                log.info(f"listening on http://{host}:{port}", action="server.listen", host=host, port=port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._runtime.drain()
        self.should_exit = True

    def fail(self) -> None:
        """End without draining: there is nothing to drain."""
        self.should_exit = True


def serve(settings: Settings) -> Exception | None:
    """Serve until a signal; returns why the server could not warm up, if it could not.

    Raises StoreError or InvalidInput when the data directory or a file of the settings cannot be used.
    """
    runtime = Runtime.open(settings)
    try:
        servers: list[DrainingServer] = []
        app = create_app(runtime, on_failure=lambda: servers[0].fail())
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
        )
        servers.append(DrainingServer(config, runtime))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        servers[0].run()
        return runtime.failure
    finally:
        runtime.close()
