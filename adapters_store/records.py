"""What the store hands out: frozen records, never rows of the database.

Times are timezone-aware UTC datetimes. Sizes are bytes. Digests are sha256 in hexadecimal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

VersionKind = Literal["routing", "adapter", "mu"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Json = dict[str, Any]

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; `next_cursor` is None on the last one."""

    items: list[T]
    next_cursor: str | None


@dataclass(frozen=True)
class TaskSeed:
    """A task that comes with an inventory: its routing becomes version 1, served."""

    id: str
    instruction: str
    blob: bytes
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class InventoryRecord:
    """An inventory in the catalog; `digest` and `size_bytes` are its blob's."""

    name: str
    digest: str
    backbone_fingerprint: str
    num_skills: int
    num_heads: int
    rank: int
    alpha: float
    size_bytes: int
    metadata: Json
    created_at: datetime


@dataclass(frozen=True)
class TaskRecord:
    """A task; `served_version` is None until a version is promoted."""

    id: str
    instruction: str
    defaults: Json
    inventory: str | None
    served_version: int | None
    metadata: Json
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class VersionRecord:
    """An immutable version of a task.

    `blob_digest` is None and `size_bytes` 0 for kind "mu", which needs no blob. `instruction` is the one
    the version was learned with, or None where none was given; promotion puts it in force for the task.
    """

    task_id: str
    number: int
    kind: VersionKind
    inventory: str | None
    inventory_digest: str | None
    blob_digest: str | None
    size_bytes: int
    method: str | None
    job_id: str | None
    metrics: Json
    created_at: datetime
    instruction: str | None = None


@dataclass(frozen=True)
class JobRecord:
    """One adaptation. `version` is the one it made; `attempts` counts the workers that took it and did not
    give it back by themselves."""

    id: str
    task_id: str
    method: str
    status: JobStatus
    request: Json
    progress: Json
    metrics: Json
    error: str | None
    version: int | None
    attempts: int
    worker_id: str | None
    cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `seq` counts 1, 2, 3 … within it."""

    job_id: str
    seq: int
    type: str
    data: Json
    created_at: datetime


@dataclass(frozen=True)
class Damage:
    """One thing that `verify` found.

    `digest` is empty when it is the catalog itself. `used_by` names inventories ("inventory NAME") and
    versions ("task@3").
    """

    digest: str
    path: Path
    problem: Literal["missing", "truncated", "altered", "unreadable", "corrupt catalog"]
    used_by: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.problem}: {self.path} (used by {', '.join(self.used_by)})"


@dataclass(frozen=True)
class GcReport:
    """What `gc` removed."""

    blobs: int
    temporary_files: int
    checkpoints: int
    freed_bytes: int


@dataclass(frozen=True)
class BackupReport:
    """What `backup` wrote; `damaged` names blobs that could not be copied because they are not sound."""

    path: Path
    blobs: int
    size_bytes: int
    damaged: tuple[Damage, ...]
