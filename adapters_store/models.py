"""The catalog's tables. Rows stay inside this package; `records.py` has what leaves it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates

from adapters_store.records import InventoryRecord, JobEvent, JobRecord, TaskRecord, VersionRecord
from adapters_store.values import plain_json

# Ids sort by byte everywhere, so that a cursor means the same on every backend.
Id = String(128).with_variant(String(128, collation="C"), "postgresql")
Digest = String(64)


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware UTC datetime, also in SQLite, which stores no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own hook


class HoldsJson:
    """Keeps JSON columns as they will read after storing, whatever the caller does to its own objects."""

    @validates("details", "defaults", "metrics", "request", "progress", "data")
    def _as_stored(self, key: str, value: dict[str, Any]) -> dict[str, Any]:
        return plain_json("metadata" if key == "details" else key, value)


class InventoryRow(HoldsJson, Base):
    __tablename__ = "inventories"

    name: Mapped[str] = mapped_column(Id, primary_key=True)
    digest: Mapped[str] = mapped_column(Digest)
    backbone_fingerprint: Mapped[str] = mapped_column(Text)
    num_skills: Mapped[int]
    num_heads: Mapped[int]
    rank: Mapped[int]
    alpha: Mapped[float] = mapped_column(Double)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    # `metadata` is SQLAlchemy's own attribute of a model.
    details: Mapped[dict[str, Any]] = mapped_column("metadata")
    created_at: Mapped[datetime]

    def record(self) -> InventoryRecord:
        return InventoryRecord(
            name=self.name,
            digest=self.digest,
            backbone_fingerprint=self.backbone_fingerprint,
            num_skills=self.num_skills,
            num_heads=self.num_heads,
            rank=self.rank,
            alpha=self.alpha,
            size_bytes=self.size_bytes,
            metadata=self.details,
            created_at=self.created_at,
        )


class TaskRow(HoldsJson, Base):
    __tablename__ = "tasks"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    instruction: Mapped[str] = mapped_column(Text)
    defaults: Mapped[dict[str, Any]]
    inventory: Mapped[str | None] = mapped_column(Id, ForeignKey("inventories.name"))
    served_version: Mapped[int | None]
    details: Mapped[dict[str, Any]] = mapped_column("metadata")
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]

    def record(self) -> TaskRecord:
        return TaskRecord(
            id=self.id,
            instruction=self.instruction,
            defaults=self.defaults,
            inventory=self.inventory,
            served_version=self.served_version,
            metadata=self.details,
            created_at=self.created_at,
            updated_at=self.updated_at,
        )


class VersionRow(HoldsJson, Base):
    __tablename__ = "versions"

    task_id: Mapped[str] = mapped_column(Id, ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    inventory: Mapped[str | None] = mapped_column(Id, ForeignKey("inventories.name"))
    inventory_digest: Mapped[str | None] = mapped_column(Digest)
    blob_digest: Mapped[str | None] = mapped_column(Digest)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    method: Mapped[str | None] = mapped_column(String(255))
    job_id: Mapped[str | None] = mapped_column(String(32))
    metrics: Mapped[dict[str, Any]]
    instruction: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime]

    def record(self) -> VersionRecord:
        return VersionRecord(
            task_id=self.task_id,
            number=self.number,
            kind=self.kind,  # type: ignore[arg-type]  # checked when the row was made
            inventory=self.inventory,
            inventory_digest=self.inventory_digest,
            blob_digest=self.blob_digest,
            size_bytes=self.size_bytes,
            method=self.method,
            job_id=self.job_id,
            metrics=self.metrics,
            created_at=self.created_at,
            instruction=self.instruction,
        )


class JobRow(HoldsJson, Base):
    """A job. `seq` orders jobs by creation whatever the clock does; `last_event` counts its events."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_status_seq", "status", "seq"), Index("ix_jobs_task_id_seq", "task_id", "seq"))

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(32), unique=True)
    task_id: Mapped[str] = mapped_column(Id)
    method: Mapped[str] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(16))
    request: Mapped[dict[str, Any]]
    idempotency_key: Mapped[str | None] = mapped_column(String(255), unique=True)
    progress: Mapped[dict[str, Any]]
    metrics: Mapped[dict[str, Any]]
    error: Mapped[str | None] = mapped_column(Text)
    version: Mapped[int | None]
    attempts: Mapped[int]
    worker_id: Mapped[str | None] = mapped_column(String(255))
    lease_expires_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool]
    last_event: Mapped[int]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    def record(self) -> JobRecord:
        return JobRecord(
            id=self.id,
            task_id=self.task_id,
            method=self.method,
            status=self.status,  # type: ignore[arg-type]  # checked when the row was made
            request=self.request,
            progress=self.progress,
            metrics=self.metrics,
            error=self.error,
            version=self.version,
            attempts=self.attempts,
            worker_id=self.worker_id,
            cancel_requested=self.cancel_requested,
            created_at=self.created_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
        )


class EventRow(HoldsJson, Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(String(32), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]

    def record(self) -> JobEvent:
        return JobEvent(job_id=self.job_id, seq=self.seq, type=self.type, data=self.data, created_at=self.created_at)
