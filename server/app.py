"""The HTTP application around a runtime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI

from server import __version__
from server.api import adapt, docs, errors, generate, inventories, jobs, ops, tasks
from server.api.middleware import BodyLimit, RequestContext
from server.engine.threads import compute_alone
from server.logs import get_logger
from server.runtime import Runtime

log = get_logger(__name__)


def create_app(runtime: Runtime, on_failure: Callable[[], None] = lambda: None) -> FastAPI:
    """The application. Its lifespan warms the runtime in the background, so that /healthz answers at once.

    `on_failure` is called when warming failed; `runtime.failure` then has the reason. Who opened the runtime
    closes it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # What computes beside the engine, such as assembly, runs here; see server/engine/threads.py.
        executor = ThreadPoolExecutor(thread_name_prefix="work", initializer=compute_alone)
        asyncio.get_running_loop().set_default_executor(executor)
        warming = asyncio.create_task(_warm(runtime, on_failure))
        yield
        await warming

    app = FastAPI(
        title=docs.TITLE,
        summary=docs.SUMMARY,
        description=docs.DESCRIPTION,
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        separate_input_output_schemas=False,
    )
    app.state.runtime = runtime
    errors.install(app)
    for resource in (generate, adapt, jobs, tasks, inventories, ops):
        app.include_router(resource.router)
    app.add_middleware(BodyLimit, limit_bytes=runtime.settings.max_body_mb * 1024 * 1024)
    app.add_middleware(RequestContext, metrics=runtime.metrics)
    return app


async def _warm(runtime: Runtime, on_failure: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(runtime.warm)
    except Exception:
        log.exception("the server cannot start", action="server.failed")
        on_failure()
