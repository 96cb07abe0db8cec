"""The running server: what it opens, in which order, and how it stops.

open (lock, store, keys) → warm (backbone, inventories, engine) → serve → drain → close, in reverse.
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapters_store.errors import StoreError
from adapters_store.lock import DataDirLock
from adapters_store.store import Store
from server import __version__
from server.adaptation import AdaptationService
from server.adapters.cache import AdapterCache
from server.adapters.injection import inject, linear_sizes
from server.backbone import Backbone, load_backbone
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.request import EngineRequest, FinishOutput, SamplingParams
from server.engine.runner import Runner
from server.engine.service import EngineService
from server.errors import MHRError, Unavailable
from server.export import TaskExporter
from server.generation import GenerationService
from server.inventories import bundled_names, import_bundled
from server.job_metrics import JobWatch
from server.logs import get_logger
from server.metrics import Metrics
from server.settings import Settings, load_api_keys
from server.supervisor import Supervisor, worker_command, worker_environ
from server.tasks import TaskCatalog

_MIB = 1024 * 1024
_WORKER_STOP_S = 20.0

log = get_logger(__name__)


class Phase(enum.Enum):
    """Where a server stands in its life."""

    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True)
class Services:
    """The parts of a warm server."""

    store: Store
    backbone: Backbone
    catalog: TaskCatalog
    engine: EngineService
    generation: GenerationService
    adaptation: AdaptationService
    exporter: TaskExporter


class Runtime:
    """Everything long-lived. Make it with `open`; then `warm`, and at last `drain` and `close`."""

    def __init__(self, settings: Settings, lock: DataDirLock, store: Store, api_keys: dict[str, str]) -> None:
        self.settings = settings
        self.store = store
        self.api_keys = api_keys
        self.metrics = Metrics(settings.metrics_tasks)
        self._phase = Phase.WARMING
        self._reason: str | None = "starting"
        self.failure: Exception | None = None
        self.supervisor: Supervisor | None = None
        self._lock = lock
        self._services: Services | None = None
        self._jobs = JobWatch(store, self.metrics)

    @classmethod
    def open(cls, settings: Settings) -> Runtime:
        """Take the data directory and open its store. Raises StoreError or InvalidInput."""
        api_keys = {} if settings.api_keys_file is None else load_api_keys(settings.api_keys_file)
        lock = DataDirLock(settings.data_dir)
        lock.acquire()
        try:
            return cls(settings, lock, Store.open(settings.data_dir, settings.database()), api_keys)
        except BaseException:
            lock.release()
            raise

    # --- warming ------------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Load everything and begin to serve; blocks for seconds. What goes wrong is raised and kept in `failure`."""
        try:
            self._services = self._load()
            self._answer_once(self._services)
        except Exception as error:
            self._phase, self._reason, self.failure = Phase.FAILED, str(error), error
            raise
        if self._phase is not Phase.WARMING:  # asked to stop meanwhile
            return
        if self.settings.worker:
            self.supervisor = Supervisor(worker_command(), worker_environ(self.settings.environ(os.environ)))
            self.supervisor.start()
        self._phase, self._reason = Phase.READY, None
        log.info("ready", action="server.ready", data_dir=str(self.settings.data_dir))

    def _load(self) -> Services:
        settings = self.settings
        self._reason = f"loading the backbone {settings.backbone}"
        dtype = getattr(torch, settings.dtype)
        backbone = load_backbone(settings.backbone, settings.data_dir, settings.device, dtype)
        self.metrics.build_info(
            version=__version__, backbone=backbone.name, device=settings.device, dtype=settings.dtype
        )
        sizes = linear_sizes(backbone.model)
        self._reason = "importing the bundled inventory"
        import_bundled(self.store, backbone, sizes)
        cache = AdapterCache(settings.adapter_cache_mb * _MIB)
        catalog = TaskCatalog(
            self.store,
            cache,
            backbone,
            sizes,
            preferred_inventories=[settings.inventory] if settings.inventory else bundled_names(),
            on_assembly=self.metrics.assembly,
        )
        if settings.inventory is not None:
            catalog.pick_inventory(settings.inventory)
        elif catalog.served_inventory() is None:
            log.warning("no inventory fits the backbone; only `base` is served", action="inventory.none")
        self._reason = "starting the engine"
        max_context = min(settings.max_context, backbone.context_length)
        config = EngineConfig(
            max_batch=settings.max_batch,
            max_context=max_context,
            max_queue=settings.max_queue,
            prefill_chunk=settings.prefill_chunk,
            # A GPU's step hardly grows with prompt tokens.
            busy_prefill_chunk=EngineConfig.busy_prefill_chunk if settings.device == "cpu" else None,
            prefix_cache_bytes=settings.prefix_cache_mb * _MIB,
            threads=settings.threads,
            quantization=settings.quantization,
            merged_tasks=settings.merged_tasks,
        )
        runner = Runner(backbone.model, inject(backbone.model), config)
        engine = EngineService(Engine(runner, config, backbone.eos_token_ids), on_step=self.metrics.step)
        self.metrics.watch_adapter_cache(cache.stats, runner.merged_stats)
        self.metrics.watch_engine(
            lambda: engine.num_running, lambda: engine.num_waiting, lambda: engine.prefix_cache_bytes
        )
        generation = GenerationService(
            catalog,
            engine,
            backbone,
            self.metrics,
            max_context=max_context,
            max_sequences=settings.max_inputs,
            timeout_s=settings.request_timeout_s,
        )
        adaptation = AdaptationService(self.store, catalog, backbone, max_examples=settings.max_examples)
        exporter = TaskExporter(catalog, backbone, settings.backbone)
        return Services(self.store, backbone, catalog, engine, generation, adaptation, exporter)

    def _answer_once(self, services: Services) -> None:
        """Run one tiny request, so that the first real one finds everything allocated."""
        self._reason = "warming up"
        services.engine.start()

        async def run() -> None:
            request = EngineRequest("warm-up", "base", (1, 1), SamplingParams(max_new_tokens=2, ignore_eos=True))
            async with services.engine.submit(request) as events:
                async for event in events:
                    if isinstance(event, FinishOutput) and event.error is not None:
                        raise event.error

        asyncio.run(run())

    # --- serving ------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where the server stands; a broken engine makes a ready server a failed one."""
        return Phase.FAILED if self._engine_is_broken else self._phase

    @property
    def reason(self) -> str | None:
        """Why the server is not ready; None when it is."""
        return "the engine is broken; restart the server" if self._engine_is_broken else self._reason

    @property
    def _engine_is_broken(self) -> bool:
        services = self._services
        return self._phase is Phase.READY and services is not None and not services.engine.accepting

    def services(self) -> Services:
        """The parts of the warm server. Raises Unavailable while it is not warm."""
        if self._services is None or self.phase in (Phase.WARMING, Phase.FAILED):
            raise Unavailable(f"the server is not ready: {self.reason}; try again soon", code="warming")
        return self._services

    def accepting(self) -> Services:
        """Like `services`, for calls that start new work: also Unavailable while draining."""
        if self.phase is Phase.DRAINING:
            raise Unavailable("the server is stopping; send the request again", retry_after_s=5, code="draining")
        return self.services()

    def services_if_warm(self) -> Services | None:
        """The parts, or None before they are there."""
        return self._services

    def scrape(self) -> bytes:
        """The metrics' exposition, with the jobs as they are now."""
        try:
            self._jobs.update()
        except StoreError as error:
            log.warning("cannot count jobs", action="metrics.jobs", error=str(error))
        return self.metrics.render()

    # --- stopping -----------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Refuse new work and wait for the work in flight, `drain_timeout_s` at most."""
        self._phase, self._reason = Phase.DRAINING, "the server is stopping"
        log.info("draining", action="server.drain")
        if self._services is not None and not await self._services.engine.drain(self.settings.drain_timeout_s):
            log.warning("some requests were not finished in time", action="server.drain")

    def close(self) -> None:
        """Stop the worker and the engine, close the store, give the data directory back. May be called twice."""
        steps: list[Callable[[], None]] = []
        if self.supervisor is not None:
            supervisor = self.supervisor
            steps.append(lambda: supervisor.stop(_WORKER_STOP_S))
        if self._services is not None:
            steps.append(self._services.engine.stop)
        for step in [*steps, self.store.close, self._lock.release]:
            try:
                step()
            except (MHRError, StoreError, OSError):
                log.exception("a part did not stop well", action="server.stop")
        self.supervisor, self._services = None, None
        log.info("stopped", action="server.stop")
