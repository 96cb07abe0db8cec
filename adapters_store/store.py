"""The store: the only class that anyone outside calls for persistence.

Every change is one transaction; a row that names a blob is committed only after the blob is durable. So a
crash at any instant leaves the old state or the new one, and at worst an orphan blob that `gc` removes.
A Store may be used from many threads, and several processes may open the same data directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from adapters_store import upkeep, values
from adapters_store.blobs import BlobStore
from adapters_store.catalog import inventories as inventory_rows
from adapters_store.catalog import jobs as job_rows
from adapters_store.catalog import tasks as task_rows
from adapters_store.checkpoints import CheckpointFiles
from adapters_store.database import Database, catalog_url
from adapters_store.errors import Conflict, StoreError
from adapters_store.models import InventoryRow, JobRow
from adapters_store.records import (
    BackupReport,
    Damage,
    GcReport,
    InventoryRecord,
    JobEvent,
    JobRecord,
    JobStatus,
    Json,
    Page,
    TaskRecord,
    TaskSeed,
    VersionKind,
    VersionRecord,
)

ORPHAN_AGE_S = 3600.0


class Store:
    """Catalog, blobs and checkpoints of one data directory. Open it with `Store.open`.

    Every method that touches the catalog may raise CatalogUnavailable.
    """

    def __init__(
        self, database: Database, blobs: BlobStore, checkpoints: CheckpointFiles, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        self._checkpoints = checkpoints
        self._clock = clock
        self.blobs = blobs

    @classmethod
    def open(
        cls, data_dir: Path, database_url: str | None = None, *, clock: Callable[[], datetime] = values.utc_now
    ) -> Store:
        """Open the store, creating folders and schema where absent.

        The catalog is `catalog.sqlite3` in the data directory unless a URL names another. Raises StoreError
        when the directory cannot be used, InvalidValue for a bad URL, CatalogUnavailable.
        """
        url = catalog_url(data_dir, database_url)
        try:
            blobs = BlobStore(data_dir / "blobs")
            checkpoints = CheckpointFiles(data_dir / "checkpoints")
        except OSError as error:
            raise StoreError(
                f"the data directory {data_dir} cannot be used: {error}. Choose a writable one."
            ) from error
        return cls(Database(url), blobs, checkpoints, clock)

    def close(self) -> None:
        """Close the catalog's connections; the store cannot be used afterwards."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    # ---- inventories

    def add_inventory(
        self,
        name: str,
        data: bytes,
        *,
        backbone_fingerprint: str,
        num_skills: int,
        num_heads: int,
        rank: int,
        alpha: float,
        metadata: Json,
        tasks: Sequence[TaskSeed] = (),
    ) -> InventoryRecord:
        """Add an inventory and its tasks, each with its routing as served version 1, all or nothing.

        The same name with the same bytes changes nothing and returns the inventory there is. Raises
        InvalidValue, or Conflict for a name that has other bytes and for a task id that exists already.
        """
        values.check_inventory_name(name)
        task_rows.check_seeds(tasks)
        # Also when the inventory is known: importing again repairs what was damaged.
        digest, *routings = self.blobs.put_many([data, *(seed.blob for seed in tasks)])
        now = self._clock()
        with self._database.write() as session:
            known = inventory_rows.find_inventory(session, name)
            if known is not None:
                if known.digest == digest:
                    return known.record()
                raise Conflict(f"the inventory {name!r} exists with other content; import this one under another name.")
            task_rows.refuse_taken_ids(session, [seed.id for seed in tasks])
            row = InventoryRow(
                name=name,
                digest=digest,
                backbone_fingerprint=backbone_fingerprint,
                num_skills=num_skills,
                num_heads=num_heads,
                rank=rank,
                alpha=alpha,
                size_bytes=len(data),
                details=metadata,
                created_at=now,
            )
            session.add(row)
            session.flush()
            task_rows.insert_seeds(session, row, tasks, routings, now)
            return row.record()

    def get_inventory(self, name: str) -> InventoryRecord:
        """Raises NotFound."""
        with self._database.read() as session:
            return inventory_rows.get_inventory(session, name).record()

    def list_inventories(self) -> list[InventoryRecord]:
        """All inventories, by name."""
        with self._database.read() as session:
            return [row.record() for row in inventory_rows.list_inventories(session)]

    # ---- tasks

    def put_task(
        self, task_id: str, *, instruction: str, defaults: Json, inventory: str | None, metadata: Json
    ) -> TaskRecord:
        """Create the task, or replace all of it but its versions. Raises InvalidValue, or NotFound (inventory)."""
        values.check_task_id(task_id)
        fields = task_rows.TaskFields(instruction, defaults, inventory, metadata)
        with self._database.write() as session:
            return task_rows.put_task(session, task_id, fields, self._clock()).record()

    def update_task(
        self,
        task_id: str,
        *,
        instruction: str | None = None,
        defaults: Json | None = None,
        metadata: Json | None = None,
    ) -> TaskRecord:
        """Change what is given and keep the rest. Raises InvalidValue or NotFound."""
        values.check_text("instruction", instruction)
        with self._database.write() as session:
            row = task_rows.get_task(session, task_id)
            task_rows.update_task(row, instruction, defaults, metadata, self._clock())
            return row.record()

    def delete_task(self, task_id: str) -> None:
        """Delete the task and its versions. Raises NotFound, or Conflict while a job adapts it."""
        with self._database.write() as session:
            row = task_rows.get_task(session, task_id)
            job = job_rows.active_job(session, task_id)
            if job is not None:
                raise Conflict(
                    f"job {job.id} adapts the task {task_id!r}; cancel it or wait for it, then delete the task."
                )
            task_rows.delete_task(session, row)

    def get_task(self, task_id: str) -> TaskRecord:
        """Raises NotFound."""
        with self._database.read() as session:
            return task_rows.get_task(session, task_id).record()

    def list_tasks(self, limit: int = 100, cursor: str | None = None, prefix: str | None = None) -> Page[TaskRecord]:
        """One page of tasks by id, of those that begin with `prefix`. Raises InvalidValue for a bad limit."""
        values.check_limit(limit)
        with self._database.read() as session:
            return task_rows.list_tasks(session, limit, cursor, prefix)

    def count_tasks(self) -> int:
        """The number of tasks."""
        with self._database.read() as session:
            return task_rows.count_tasks(session)

    # ---- versions

    def register_task(
        self,
        task_id: str,
        *,
        instruction: str,
        defaults: Json,
        inventory: str | None,
        metadata: Json,
        kind: VersionKind,
        blob: bytes | None,
    ) -> VersionRecord:
        """Put the task, add a version and serve it, in one transaction. Raises as put_task and add_version."""
        values.check_task_id(task_id)
        fields = task_rows.TaskFields(instruction, defaults, inventory, metadata)
        task_rows.check_version(kind, inventory, blob is not None)
        new = task_rows.NewVersion(kind, inventory, self._stored(blob), instruction=instruction)
        now = self._clock()
        with self._database.write() as session:
            task = task_rows.put_task(session, task_id, fields, now)
            return task_rows.add_version(session, task, new, promote=True, now=now).record()

    def add_version(
        self,
        task_id: str,
        *,
        kind: VersionKind,
        inventory: str | None,
        blob: bytes | None,
        method: str | None,
        job_id: str | None,
        metrics: Json,
        promote: bool,
        instruction: str | None = None,
    ) -> VersionRecord:
        """Add the task's next version, and serve it if `promote`.

        `instruction` is the one it was learned with. Raises InvalidValue, or NotFound (task, inventory).
        """
        values.check_text("instruction", instruction)
        task_rows.check_version(kind, inventory, blob is not None)
        stored = self._stored(blob)
        new = task_rows.NewVersion(kind, inventory, stored, method, job_id, metrics, instruction)
        with self._database.write() as session:
            task = task_rows.get_task(session, task_id)
            return task_rows.add_version(session, task, new, promote=promote, now=self._clock()).record()

    def get_version(self, task_id: str, number: int | None = None) -> VersionRecord:
        """A version by number, or the one that is served. Raises NotFound."""
        with self._database.read() as session:
            task = task_rows.get_task(session, task_id)
            if number is None:
                return task_rows.served_version(session, task).record()
            return task_rows.find_version(session, task, number).record()

    def list_versions(self, task_id: str) -> list[VersionRecord]:
        """All versions of the task, oldest first. Raises NotFound."""
        with self._database.read() as session:
            task = task_rows.get_task(session, task_id)
            return [row.record() for row in task_rows.list_versions(session, task)]

    def promote(self, task_id: str, number: int) -> TaskRecord:
        """Serve this version, with the instruction and inventory it was learned with. Raises NotFound."""
        with self._database.write() as session:
            task = task_rows.get_task(session, task_id)
            task_rows.serve(task, task_rows.find_version(session, task, number), self._clock())
            return task.record()

    # ---- jobs

    def create_job(
        self, *, task_id: str, method: str, request: Json, idempotency_key: str | None = None
    ) -> tuple[JobRecord, bool]:
        """Queue a job and return it with True.

        A second call with the same key and the same task, method and request returns the first job and
        False. Raises InvalidValue, or Conflict for a key that was used for another request.
        """
        values.check_task_id(task_id)
        values.check_key("method", method)
        values.check_key("idempotency_key", idempotency_key)
        with self._database.write() as session:
            row, created = job_rows.create_job(session, task_id, method, request, idempotency_key, self._clock())
            return row.record(), created

    def get_job(self, job_id: str) -> JobRecord:
        """Raises NotFound."""
        with self._database.read() as session:
            return job_rows.get_job(session, job_id).record()

    def list_jobs(
        self,
        limit: int = 100,
        cursor: str | None = None,
        status: JobStatus | None = None,
        task_id: str | None = None,
    ) -> Page[JobRecord]:
        """One page of jobs, newest first. Raises InvalidValue for a bad limit, cursor or status."""
        values.check_limit(limit)
        with self._database.read() as session:
            return job_rows.list_jobs(session, limit, cursor, status, task_id)

    def count_jobs_by_status(self) -> dict[str, int]:
        """The number of jobs in each of the five statuses."""
        with self._database.read() as session:
            return job_rows.count_by_status(session)

    def claim_job(self, worker_id: str, lease_s: float) -> JobRecord | None:
        """Give the worker the oldest job that is queued, or whose lease ran out; None if there is none."""
        values.check_key("worker_id", worker_id)
        with self._database.read() as session:
            # An idle worker asks often: look first, without the write lock.
            if job_rows.next_job(session, self._clock()) is None:
                return None
        with self._database.write() as session:
            row = job_rows.claim(session, worker_id, lease_s, self._clock())
            return None if row is None else row.record()

    def heartbeat(self, job_id: str, worker_id: str, lease_s: float, progress: Json | None = None) -> JobRecord:
        """Renew the lease; the caller looks at `cancel_requested` of what returns. Raises NotFound or LeaseLost."""
        with self._database.write() as session:
            row = job_rows.held_job(session, job_id, worker_id)
            job_rows.renew(row, lease_s, progress, self._clock())
            return row.record()

    def finish_job(
        self,
        job_id: str,
        worker_id: str,
        status: JobStatus,
        *,
        version: int | None = None,
        error: str | None = None,
        metrics: Json | None = None,
    ) -> JobRecord:
        """End the job; its checkpoint goes. Raises InvalidValue (status), NotFound or LeaseLost."""
        job_rows.check_finished(status)
        error = None if error is None else values.clean_text(error)
        with self._database.write() as session:
            row = job_rows.held_job(session, job_id, worker_id)
            job_rows.finish(session, row, status, version, error, metrics or {}, self._clock())
        return self._without_checkpoint(row)

    def complete_job_with_version(
        self,
        job_id: str,
        worker_id: str,
        *,
        kind: VersionKind,
        inventory: str | None,
        blob: bytes | None,
        instruction: str,
        defaults: Json,
        metadata: Json,
        promote: bool,
        metrics: Json,
    ) -> VersionRecord:
        """Keep what the job learned and end it as succeeded, in one transaction.

        A task that does not exist is created from instruction, defaults and metadata; one that exists keeps
        its own, but for the instruction, which promotion puts in force. Raises InvalidValue, NotFound (job,
        inventory) or LeaseLost, and then nothing is kept.
        """
        fields = task_rows.TaskFields(instruction, defaults, inventory, metadata)
        task_rows.check_version(kind, inventory, blob is not None)
        stored = self._stored(blob)
        now = self._clock()
        with self._database.write() as session:
            job = job_rows.held_job(session, job_id, worker_id)
            task = task_rows.find_task(session, job.task_id) or task_rows.put_task(session, job.task_id, fields, now)
            new = task_rows.NewVersion(kind, inventory, stored, job.method, job_id, metrics, instruction)
            version = task_rows.add_version(session, task, new, promote=promote, now=now)
            job_rows.finish(session, job, "succeeded", version.number, None, metrics, now)
        self._without_checkpoint(job)
        return version.record()

    def release_job(self, job_id: str, worker_id: str) -> JobRecord:
        """Put the job back into the queue, e.g. at shutdown; its checkpoint stays, the attempt does not count.

        A job whose cancellation was requested becomes cancelled. Raises NotFound or LeaseLost.
        """
        with self._database.write() as session:
            row = job_rows.held_job(session, job_id, worker_id)
            job_rows.release(session, row, self._clock())
        return self._without_checkpoint(row)

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job at once; ask the worker of a running one to stop. Raises NotFound or Conflict (ended)."""
        with self._database.write() as session:
            row = job_rows.get_job(session, job_id)
            job_rows.request_cancel(session, row, self._clock())
        return self._without_checkpoint(row)

    def append_event(self, job_id: str, type: str, data: Json) -> JobEvent:
        """Add the job's next event. Raises InvalidValue (type) or NotFound."""
        job_rows.check_event_type(type)
        with self._database.write() as session:
            row = job_rows.get_job(session, job_id)
            return job_rows.append_event(session, row, type, data, self._clock()).record()

    def list_events(self, job_id: str, after: int = 0) -> list[JobEvent]:
        """The job's events whose `seq` is greater than `after`, in order. Raises NotFound."""
        with self._database.read() as session:
            row = job_rows.get_job(session, job_id)
            return [event.record() for event in job_rows.list_events(session, row, after)]

    # ---- checkpoints

    def save_checkpoint(self, job_id: str, data: bytes) -> None:
        """Replace the job's checkpoint, atomically and durably."""
        self._checkpoints.save(job_id, data)

    def load_checkpoint(self, job_id: str) -> bytes | None:
        """The job's checkpoint, or None when there is none that is sound."""
        return self._checkpoints.load(job_id)

    def delete_checkpoint(self, job_id: str) -> None:
        """Remove the job's checkpoint if there is one."""
        self._checkpoints.delete(job_id)

    # ---- upkeep

    def verify(self) -> list[Damage]:
        """All damage: blobs that are missing, truncated, altered or unreadable, and a corrupt catalog."""
        return upkeep.verify(self._database, self.blobs)

    def gc(self, min_age_s: float = ORPHAN_AGE_S) -> GcReport:
        """Remove orphan blobs, left temporary files and checkpoints of finished jobs.

        Blobs and temporary files younger than `min_age_s` seconds stay: their row may be about to be
        committed. Use 0 only while nothing else writes.
        """
        return upkeep.collect(self._database, self.blobs, self._checkpoints, min_age_s)

    def backup(self, target: Path) -> BackupReport:
        """Copy everything but checkpoints, as of one instant, into the new directory `target`.

        The copy opens as a data directory with a SQLite catalog, whatever this one is. Blobs that are not
        sound are left out and named in the report. Raises Conflict when `target` is not new or empty.
        """
        return upkeep.backup(self._database, self.blobs, target)

    def _stored(self, blob: bytes | None) -> tuple[str, int] | None:
        return None if blob is None else (self.blobs.put(blob), len(blob))

    def _without_checkpoint(self, row: JobRow) -> JobRecord:
        """The job's record; its checkpoint is removed if it is finished. A crash before leaves that to `gc`."""
        if row.status in job_rows.FINISHED:
            self._checkpoints.delete(row.id)
        return row.record()
