"""All persistence: a catalog (SQL) of inventories, tasks, versions and jobs, and blobs by content.

`Store` is the only class to call; records leave it frozen. Nothing of the server is imported here.
"""

from __future__ import annotations

from adapters_store.errors import (
    BlobDamaged,
    BlobMissing,
    CatalogUnavailable,
    Conflict,
    DataDirInUse,
    InvalidValue,
    LeaseLost,
    NotFound,
    StoreError,
)
from adapters_store.lock import DataDirLock
from adapters_store.records import (
    BackupReport,
    Damage,
    GcReport,
    InventoryRecord,
    JobEvent,
    JobRecord,
    JobStatus,
    Page,
    TaskRecord,
    TaskSeed,
    VersionKind,
    VersionRecord,
)
from adapters_store.store import Store

__all__ = [
    "BackupReport",
    "BlobDamaged",
    "BlobMissing",
    "CatalogUnavailable",
    "Conflict",
    "Damage",
    "DataDirInUse",
    "DataDirLock",
    "GcReport",
    "InvalidValue",
    "InventoryRecord",
    "JobEvent",
    "JobRecord",
    "JobStatus",
    "LeaseLost",
    "NotFound",
    "Page",
    "Store",
    "StoreError",
    "TaskRecord",
    "TaskSeed",
    "VersionKind",
    "VersionRecord",
]
