"""The adaptation worker: claims a job, runs it, decides, and persists; one at a time.

The life of a job is told in docs/structures.md. What a job learns is kept in one transaction with its end,
so a worker that dies leaves the job to be taken up again from its last checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from adapters_store.errors import LeaseLost, StoreError
from adapters_store.records import InventoryRecord, JobRecord, VersionKind, VersionRecord
from adapters_store.store import Store
from server.adapters.blobs import adapter_to_bytes, routing_to_bytes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import AdapterUnavailable, Conflict, MHRError, NotFound
from server.logs import get_logger
from server.tasks import MEAN, TaskCatalog
from server.training.adapt import (
    AdaptResult,
    AdaptSpec,
    Served,
    adapt,
    split_examples,
)
from server.training.examples import Example
from server.training.methods import Hyperparameters, Method
from server.training.pace import Pace
from server.training.search import Stopped

LEASE_S = 30.0
MAX_ATTEMPTS = 3
DEFAULT_VALIDATION_FRACTION = 0.25
_POLL_S = 0.5
_OVER = frozenset({"succeeded", "failed", "cancelled"})

log = get_logger(__name__)


class Worker:
    """Runs the store's jobs on one backbone. `load` gives the backbone and the task catalog, at the first job."""

    def __init__(
        self,
        store: Store,
        load: Callable[[], tuple[Backbone, TaskCatalog]],
        worker_id: str,
        *,
        lease_s: float = LEASE_S,
    ) -> None:
        self._store = store
        self._load = load
        self._loaded: tuple[Backbone, TaskCatalog] | None = None
        self._worker_id = worker_id
        self._lease_s = lease_s

    def run(self, stopping: threading.Event) -> None:
        """Work until told to stop; a job in hand then goes back to the queue with its checkpoint."""
        while not stopping.is_set():
            try:
                job = self._store.claim_job(self._worker_id, self._lease_s)
            except StoreError as error:
                log.error("cannot claim a job", action="worker.claim", error=str(error))
                job = None
            if job is None:
                stopping.wait(_POLL_S)
            else:
                self._work(job, stopping)

    def _work(self, job: JobRecord, stopping: threading.Event) -> None:
        """One job, to exactly one end: succeeded, failed, cancelled, released, or lost to another worker."""
        logger = log.bind(job=job.id, task=job.task_id, method=job.method, attempt=job.attempts)
        with Lease(self._store, job, self._worker_id, self._lease_s, stopping) as lease:
            try:
                end = self._attempt(job, lease)
            except LeaseLost:
                end = "lost"
            except Stopped:
                end = self._stop(job, lease)
            except MHRError as error:
                end = self._fail(job, error.message)
            except Exception as error:
                logger.exception("the job failed", action="job.failed")
                end = self._fail(job, f"{type(error).__name__}: {error}")
        if end in _OVER:
            self._store.delete_checkpoint(job.id)
        logger.info("the job ended", action="job.end", end=end)

    def _attempt(self, job: JobRecord, lease: Lease) -> str:
        if job.attempts > MAX_ATTEMPTS:
            return self._fail(job, f"the worker died {MAX_ATTEMPTS} times on this job; its last checkpoint is dropped")
        backbone, catalog = self._backbone_and_catalog()
        request = job.request
        method = Method(request["method"])
        record = catalog.pick_inventory(request["inventory"]) if method.needs_inventory else None
        inventory = None if record is None else catalog.inventory(record.digest)
        spec = make_spec(request, catalog.prompt_format(record))
        result = adapt(
            spec,
            backbone,
            inventory,
            self._served(catalog, job.task_id, spec),
            lease,
            self._store.load_checkpoint(job.id),
        )
        lease.renew()
        self._keep(job, spec, result, record, inventory, backbone)
        return "succeeded"

    def _backbone_and_catalog(self) -> tuple[Backbone, TaskCatalog]:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _served(self, catalog: TaskCatalog, task_id: str, spec: AdaptSpec) -> Served | None:
        """What a new version has to beat: the served version, else the mean, else the bare backbone (None)."""
        for reference in (task_id, MEAN):
            try:
                resolved = catalog.resolve(reference)
            except (NotFound, Conflict, AdapterUnavailable):
                continue
            resolved.release()
            adapter = None if resolved.pinned is None else resolved.pinned.adapter
            if resolved.version is None:  # the mean belongs to no task: the new task's prompt is its prompt
                return Served(adapter, spec.instruction, spec.prompt_format)
            learnt = self._learnt(self._store.get_version(task_id, resolved.version))
            return Served(adapter, resolved.instruction, resolved.prompt_format, learnt)
        return None

    def _learnt(self, version: VersionRecord) -> frozenset[Example]:
        """The examples that a version was learnt from; none of one that came by another way than a job."""
        if version.job_id is None:
            return frozenset()
        train, held_out = _split(self._store.get_job(version.job_id).request)
        return frozenset((*train, *held_out) if version.metrics.get("refit") else train)

    def _keep(
        self,
        job: JobRecord,
        spec: AdaptSpec,
        result: AdaptResult,
        record: InventoryRecord | None,
        inventory: Inventory | None,
        backbone: Backbone,
    ) -> None:
        kind: VersionKind
        if result.routing is not None:
            assert record is not None
            kind, blob = "routing", routing_to_bytes(result.routing, record.digest)
        else:
            assert result.adapter is not None
            kind, blob = "adapter", adapter_to_bytes(result.adapter, backbone.fingerprint)
        promote = _promotes(job.request["promote"], result)
        self._store.complete_job_with_version(
            job.id,
            self._worker_id,
            kind=kind,
            inventory=None if record is None else record.name,
            blob=blob,
            instruction=spec.instruction,
            defaults={},
            metadata=job.request["metadata"],
            promote=promote,
            metrics={**result.metrics, "version_bytes": len(blob), "promoted": promote},
        )

    def _stop(self, job: JobRecord, lease: Lease) -> str:
        """The two reasons to stop differ: a cancelled job is over, one at shutdown is taken up again."""
        if lease.cancelled:
            self._store.finish_job(job.id, self._worker_id, "cancelled", error="cancelled by request")
            return "cancelled"
        try:
            lease.finish_saving()
        except (OSError, StoreError) as error:
            log.warning("the job goes back with an older checkpoint", action="job.save", job=job.id, error=str(error))
        self._store.release_job(job.id, self._worker_id)
        return "released"

    def _fail(self, job: JobRecord, reason: str) -> str:
        try:
            self._store.finish_job(job.id, self._worker_id, "failed", error=reason)
        except LeaseLost:
            return "lost"
        return "failed"


class Lease:
    """A job in hand: renewed in the background, and the job's context for the training code.

    `should_stop` is true once the job was cancelled, the worker is to stop, or another worker holds it.
    """

    def __init__(self, store: Store, job: JobRecord, worker_id: str, lease_s: float, stopping: threading.Event) -> None:
        self._store = store
        self._job_id = job.id
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._stopping = stopping
        self._over = threading.Event()
        self._lost = False
        self.cancelled = job.cancel_requested
        self._progress: dict[str, Any] = dict(job.progress)
        self._pace = Pace()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease-{job.id}", daemon=True)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix=f"checkpoint-{job.id}")
        self._saving: Future[None] | None = None

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._saver.shutdown()

    def should_stop(self) -> bool:
        if self._lost:
            raise LeaseLost(f"another worker took the job {self._job_id}")
        return self.cancelled or self._stopping.is_set()

    def report(self, event: str, data: dict[str, Any]) -> None:
        if event == "step":
            data = data | {"remaining_s": self._pace.remaining_s(data["step"], data["steps"])}
            self._progress = data
        self._store.append_event(self._job_id, event, data)

    def save(self, checkpoint: bytes) -> None:
        """Write a checkpoint while the job goes on; raises what went wrong with the one before."""
        self.finish_saving()
        self._saving = self._saver.submit(self._store.save_checkpoint, self._job_id, checkpoint)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is on the disk; raises what went wrong with it."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def renew(self) -> None:
        """Hold the job for another while and note its progress. Raises LeaseLost."""
        record = self._store.heartbeat(self._job_id, self._worker_id, self._lease_s, self._progress)
        self.cancelled = self.cancelled or record.cancel_requested

    def _keep_renewing(self) -> None:
        # Often enough that a cancellation is felt within a second or two, and no lease runs out under load.
        while not self._over.wait(min(1.0, self._lease_s / 4)):
            try:
                self.renew()
            except LeaseLost:
                self._lost = not self._over.is_set()
                return
            except StoreError as error:
                log.warning("cannot renew the lease", action="lease.renew", job=self._job_id, error=str(error))


def make_spec(request: Mapping[str, Any], prompt_format: str) -> AdaptSpec:
    """The adaptation that a job's request asks for."""
    train, held_out = _split(request)
    return AdaptSpec(
        method=Method(request["method"]),
        instruction=request["instruction"],
        examples=train,
        validation=held_out,
        prompt_format=prompt_format,
        hyperparameters=Hyperparameters(**request["hyperparameters"]),
        seed=request["seed"],
        drawn=_set_apart(request) is None,
    )


def _split(request: Mapping[str, Any]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(training, validation) examples of a request."""
    fraction = (request["validation"] or {}).get("fraction") or DEFAULT_VALIDATION_FRACTION
    return split_examples(_examples(request["examples"]), _set_apart(request), fraction, request["seed"])


def _set_apart(request: Mapping[str, Any]) -> list[Example] | None:
    """The validation examples that came with a request, if any did."""
    given = (request["validation"] or {}).get("examples")
    return None if given is None else _examples(given)


def _examples(rows: list[dict[str, Any]]) -> list[Example]:
    return [Example(row["input"], tuple(row["output"])) for row in rows]


def _promotes(promote: str, result: AdaptResult) -> bool:
    if promote == "if_better":
        return result.before is not None and result.after.better_than(result.before)
    return promote == "always"
