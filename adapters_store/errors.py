"""Everything the store refuses or finds broken.

StoreError
├── InvalidValue         a value that no record may hold: a bad id, an unknown kind or status, NUL in a text
├── NotFound             no such inventory, task, version or job
├── Conflict             the present state forbids it: a name taken, a job finished
├── LeaseLost            another worker holds the job, or nobody does
├── BlobMissing          a blob is not on disk
├── BlobDamaged          a blob's bytes are not those it was named for
├── DataDirInUse         another server holds the data directory
└── CatalogUnavailable   the database cannot be reached, is locked, full, or of another schema
"""

from __future__ import annotations

from pathlib import Path


class StoreError(Exception):
    """The base of the tree; `str(error)` says what is wrong and what to do."""


class InvalidValue(StoreError):
    """A value that no record may hold; `field` names the argument."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class NotFound(StoreError):
    """No inventory, task, version or job has that name."""


class Conflict(StoreError):
    """The present state forbids the operation."""


class LeaseLost(StoreError):
    """The worker that calls no longer holds the job: stop working on it and save nothing."""


class BlobMissing(StoreError):
    """A blob that should exist is not on disk."""

    def __init__(self, digest: str, path: Path) -> None:
        super().__init__(
            f"blob {digest} is missing: {path} does not exist. Restore the file from a backup, or import it again."
        )
        self.digest = digest
        self.path = path


class BlobDamaged(StoreError):
    """A blob's bytes do not have the digest that names it, or cannot be read."""

    def __init__(self, digest: str, path: Path, reason: str = "its bytes have another digest") -> None:
        super().__init__(
            f"blob {digest} is damaged: {path}: {reason}. "
            "Restore the file from a backup, or import it again; `mhr store verify` lists all damage."
        )
        self.digest = digest
        self.path = path


class DataDirInUse(StoreError):
    """Another process holds the data directory; `pid` is the holder's, when it could be read."""

    def __init__(self, data_dir: Path, pid: int | None) -> None:
        holder = f"process {pid}" if pid is not None else "another process"
        super().__init__(
            f"the data directory {data_dir} is in use by {holder}. "
            "Stop that server first, or give this one a data directory of its own."
        )
        self.data_dir = data_dir
        self.pid = pid


class CatalogUnavailable(StoreError):
    """The database cannot be used now; the message names the cause and the remedy."""
