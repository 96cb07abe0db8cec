"""Looking after a store: find damage, remove what nothing uses, copy it all."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Literal

from sqlalchemy import insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from adapters_store.blobs import BlobStore
from adapters_store.catalog import jobs
from adapters_store.checkpoints import CheckpointFiles
from adapters_store.database import Database, catalog_url
from adapters_store.errors import BlobDamaged, BlobMissing, CatalogUnavailable, Conflict
from adapters_store.files import make_directories, sync_directory
from adapters_store.models import Base, InventoryRow, VersionRow
from adapters_store.records import BackupReport, Damage, GcReport

_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 64 * 2**20


def verify(database: Database, blobs: BlobStore) -> list[Damage]:
    """Read every blob that the catalog names, and let SQLite check the catalog itself."""
    damages = _catalog_damage(database)
    with database.read() as session:
        used = _used_blobs(session)
    for digest, (size, users) in sorted(used.items()):
        try:
            blobs.get(digest)
        except (BlobMissing, BlobDamaged) as error:
            damages.append(_damage(error, size, users))
    return damages


def collect(database: Database, blobs: BlobStore, checkpoints: CheckpointFiles, min_age_s: float) -> GcReport:
    """Remove orphan blobs, temporary files and checkpoints of finished jobs.

    A blob is durable before the row that names it: blobs and temporary files younger than `min_age_s`
    seconds may belong to someone who is about to commit, and stay.
    """
    # The blobs are listed before the catalog is read, so that one which is committed in between counts as used.
    on_disk = list(blobs.digests())
    with_checkpoint = list(checkpoints.job_ids())
    with database.read() as session:
        used = _used_blobs(session).keys()
        unfinished = jobs.unfinished_ids(session)
    removed = [blobs.remove_if_older(digest, min_age_s) for digest in on_disk if digest not in used]
    orphans = [size for size in removed if size is not None]
    finished = [checkpoints.delete(job_id) for job_id in with_checkpoint if job_id not in unfinished]
    temporary = blobs.remove_temporary(min_age_s) + checkpoints.remove_temporary(min_age_s)
    return GcReport(
        blobs=len(orphans),
        temporary_files=len(temporary),
        checkpoints=len(finished),
        freed_bytes=sum(orphans) + sum(finished) + sum(temporary),
    )


def backup(database: Database, blobs: BlobStore, target: Path) -> BackupReport:
    """Copy the catalog as of one instant, as SQLite, and every blob it names into the new directory `target`.

    The copy is a data directory that can be opened. Damaged blobs are left out and named. Raises Conflict
    when `target` exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} exists and is not an empty directory; choose another place for the backup.")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    make_directories([partial])
    catalog = partial / "catalog.sqlite3"
    if database.is_sqlite:
        _copy_sqlite(Path(database.url.database or ""), catalog)
    else:
        _copy_rows(database, partial)
    report = _copy_blobs(blobs, partial, target)
    with catalog.open("rb") as file:
        os.fsync(file.fileno())
    sync_directory(partial)
    partial.replace(target)
    sync_directory(target.parent)
    return report


def _used_blobs(session: Session) -> dict[str, tuple[int, list[str]]]:
    """Every blob that the catalog names: its size and who uses it."""
    used: dict[str, tuple[int, list[str]]] = {}
    for name, digest, size in session.execute(select(InventoryRow.name, InventoryRow.digest, InventoryRow.size_bytes)):
        used.setdefault(digest, (size, []))[1].append(f"inventory {name}")
    versions = select(VersionRow.task_id, VersionRow.number, VersionRow.blob_digest, VersionRow.size_bytes)
    for row in session.execute(versions.order_by(VersionRow.task_id, VersionRow.number)):
        if row.blob_digest is not None:
            used.setdefault(row.blob_digest, (row.size_bytes, []))[1].append(f"{row.task_id}@{row.number}")
    return used


def _damage(error: BlobMissing | BlobDamaged, size: int, users: list[str]) -> Damage:
    problem: Literal["missing", "truncated", "altered", "unreadable"]
    if isinstance(error, BlobMissing):
        problem = "missing"
    elif isinstance(error.__cause__, OSError):
        problem = "unreadable"
    else:
        problem = "truncated" if error.path.stat().st_size < size else "altered"
    return Damage(error.digest, error.path, problem, tuple(users))


def _catalog_damage(database: Database) -> list[Damage]:
    if not database.is_sqlite or _is_sound(database):
        return []
    return [Damage("", Path(database.url.database or ""), "corrupt catalog", ("every task and job",))]


def _is_sound(database: Database) -> bool:
    try:
        with database.read() as session:
            return session.scalars(text("PRAGMA integrity_check")).all() == ["ok"]
    except CatalogUnavailable as error:
        # The check itself may stumble over the damage; a lock or an I/O error is another matter.
        if isinstance(error.__cause__, OperationalError):
            raise
        return False


def _copy_sqlite(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as reader, closing(sqlite3.connect(target)) as writer:
        reader.backup(writer)


def _copy_rows(database: Database, directory: Path) -> None:
    copy = Database(catalog_url(directory, None))
    try:
        with database.snapshot() as source, copy.write() as session:
            for table in Base.metadata.sorted_tables:
                rows = source.execution_options(yield_per=_ROWS_AT_ONCE).execute(select(table)).mappings()
                for part in rows.partitions():
                    session.execute(insert(table), [dict(row) for row in part])
    finally:
        copy.close()


def _copy_blobs(blobs: BlobStore, directory: Path, target: Path) -> BackupReport:
    copy = Database(catalog_url(directory, None))
    try:
        with copy.read() as session:
            used = _used_blobs(session)
    finally:
        copy.close()
    copies = BlobStore(directory / "blobs")
    damages: list[Damage] = []
    batch: list[bytes] = []
    copied = batch_bytes = 0
    for digest, (size, users) in sorted(used.items()):
        try:
            batch.append(blobs.get(digest))
        except (BlobMissing, BlobDamaged) as error:
            damages.append(_damage(error, size, users))
            continue
        copied += size
        batch_bytes += size
        if batch_bytes >= _BYTES_AT_ONCE:
            copies.put_many(batch)
            batch, batch_bytes = [], 0
    copies.put_many(batch)
    return BackupReport(path=target, blobs=len(used) - len(damages), size_bytes=copied, damaged=tuple(damages))
