"""Tasks and their versions in the catalog."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from adapters_store.catalog.inventories import get_inventory
from adapters_store.errors import Conflict, InvalidValue, NotFound
from adapters_store.models import InventoryRow, TaskRow, VersionRow
from adapters_store.records import Json, Page, TaskRecord, TaskSeed, VersionKind
from adapters_store.values import MAX_INTEGER, TASK_ID, check_task_id, check_text, plain_json

_CHUNK = 500
_PREFIX = re.compile(r"[a-z0-9._-]*")
_AFTER_ID_CHARACTERS = "\x7f"  # sorts after every character of an id


def find_task(session: Session, task_id: str) -> TaskRow | None:
    return session.get(TaskRow, task_id) if TASK_ID.fullmatch(task_id) else None


def get_task(session: Session, task_id: str) -> TaskRow:
    """Raises NotFound."""
    row = find_task(session, task_id)
    if row is None:
        raise NotFound(f"there is no task {task_id!r}; `mhr tasks list` shows those there are.")
    return row


@dataclass(frozen=True)
class TaskFields:
    """What a caller says about a task; the rest of its row is ours."""

    instruction: str
    defaults: Json
    inventory: str | None
    metadata: Json

    def __post_init__(self) -> None:
        check_text("instruction", self.instruction)


def put_task(session: Session, task_id: str, fields: TaskFields, now: datetime) -> TaskRow:
    """Create the task, or replace everything of it but its versions. Raises NotFound (inventory)."""
    if fields.inventory is not None:
        get_inventory(session, fields.inventory)
    row = find_task(session, task_id)
    if row is None:
        row = TaskRow(id=task_id, served_version=None, created_at=now)
        session.add(row)
    row.instruction, row.defaults = fields.instruction, fields.defaults
    row.inventory, row.details = fields.inventory, fields.metadata
    row.updated_at = now
    session.flush()
    return row


def list_tasks(session: Session, limit: int, cursor: str | None, prefix: str | None) -> Page[TaskRecord]:
    """Tasks by id, after the cursor."""
    check_text("cursor", cursor)
    query = select(TaskRow).order_by(TaskRow.id).limit(limit + 1)
    if cursor is not None:
        query = query.where(TaskRow.id > cursor)
    if prefix is not None:
        if _PREFIX.fullmatch(prefix) is None:
            return Page([], None)
        query = query.where(TaskRow.id >= prefix, TaskRow.id < prefix + _AFTER_ID_CHARACTERS)
    rows = session.scalars(query).all()
    next_cursor = rows[limit - 1].id if len(rows) > limit else None
    return Page([row.record() for row in rows[:limit]], next_cursor)


def count_tasks(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(TaskRow)) or 0


def update_task(
    row: TaskRow, instruction: str | None, defaults: Json | None, metadata: Json | None, now: datetime
) -> None:
    """Change what is not None."""
    if instruction is not None:
        row.instruction = instruction
    if defaults is not None:
        row.defaults = defaults
    if metadata is not None:
        row.details = metadata
    row.updated_at = now


def delete_task(session: Session, row: TaskRow) -> None:
    """Delete the task; the database deletes its versions with it."""
    session.delete(row)


def refuse_taken_ids(session: Session, task_ids: Sequence[str]) -> None:
    """Raise Conflict naming the first of the ids that is a task already."""
    for start in range(0, len(task_ids), _CHUNK):
        chunk = task_ids[start : start + _CHUNK]
        taken = session.scalar(select(TaskRow.id).where(TaskRow.id.in_(chunk)).order_by(TaskRow.id).limit(1))
        if taken is not None:
            raise Conflict(f"the task {taken!r} exists already; delete it, or import under other task names.")


def insert_seeds(
    session: Session, inventory: InventoryRow, seeds: Sequence[TaskSeed], digests: Sequence[str], now: datetime
) -> None:
    """Insert the seeds as tasks whose version 1, a routing over the inventory, is served."""
    tasks = [
        {
            "id": seed.id,
            "instruction": seed.instruction,
            "defaults": {},
            "inventory": inventory.name,
            "served_version": 1,
            "details": plain_json("metadata", seed.metadata),
            "created_at": now,
            "updated_at": now,
        }
        for seed in seeds
    ]
    versions: list[dict[str, object]] = [
        {
            "task_id": seed.id,
            "number": 1,
            "kind": "routing",
            "inventory": inventory.name,
            "inventory_digest": inventory.digest,
            "blob_digest": digest,
            "size_bytes": len(seed.blob),
            "method": None,
            "job_id": None,
            "metrics": {},
            "instruction": seed.instruction,
            "created_at": now,
        }
        for seed, digest in zip(seeds, digests, strict=True)
    ]
    if seeds:
        session.execute(insert(TaskRow), tasks)
        session.execute(insert(VersionRow), versions)


def check_seeds(seeds: Sequence[TaskSeed]) -> None:
    """Raise InvalidValue for a bad id or text, Conflict for an id that occurs twice."""
    seen = set()
    for seed in seeds:
        check_task_id(seed.id)
        check_text(f"instruction of {seed.id}", seed.instruction)
        if seed.id in seen:
            raise Conflict(f"the task {seed.id!r} occurs twice among the inventory's tasks; give each its own name.")
        seen.add(seed.id)


def check_version(kind: VersionKind, inventory: str | None, has_blob: bool) -> None:
    """Raise InvalidValue unless a version of this kind can be served from what it brings."""
    if kind not in ("routing", "adapter", "mu"):
        raise InvalidValue("kind", f"{kind!r} is no kind of version; use routing, adapter or mu.")
    if kind != "adapter" and inventory is None:
        raise InvalidValue("inventory", f"a version of kind {kind} needs an inventory; name one.")
    if has_blob != (kind != "mu"):
        wanted = "takes no blob" if kind == "mu" else "needs a blob"
        raise InvalidValue("blob", f"a version of kind {kind} {wanted}.")


@dataclass(frozen=True)
class NewVersion:
    """What a version is made of; `blob` is the digest and the size of a blob that is durable already."""

    kind: VersionKind
    inventory: str | None
    blob: tuple[str, int] | None
    method: str | None = None
    job_id: str | None = None
    metrics: Json = field(default_factory=dict)
    instruction: str | None = None


def add_version(session: Session, task: TaskRow, new: NewVersion, *, promote: bool, now: datetime) -> VersionRow:
    """Add the task's next version, and serve it if `promote`. Raises NotFound (inventory)."""
    newest = session.scalar(select(func.max(VersionRow.number)).where(VersionRow.task_id == task.id)) or 0
    digest, size = new.blob or (None, 0)
    row = VersionRow(
        task_id=task.id,
        number=newest + 1,
        kind=new.kind,
        inventory=new.inventory,
        inventory_digest=None if new.inventory is None else get_inventory(session, new.inventory).digest,
        blob_digest=digest,
        size_bytes=size,
        method=new.method,
        job_id=new.job_id,
        metrics=new.metrics,
        instruction=new.instruction,
        created_at=now,
    )
    session.add(row)
    if promote:
        serve(task, row, now)
    return row


def find_version(session: Session, task: TaskRow, number: int) -> VersionRow:
    """Raises NotFound."""
    row = session.get(VersionRow, (task.id, number)) if 0 < number <= MAX_INTEGER else None
    if row is None:
        raise NotFound(f"the task {task.id!r} has no version {number}; `mhr tasks show {task.id}` lists its versions.")
    return row


def served_version(session: Session, task: TaskRow) -> VersionRow:
    """Raises NotFound when no version was promoted yet."""
    if task.served_version is None:
        raise NotFound(f"the task {task.id!r} serves no version yet; promote one, or adapt it with examples.")
    return find_version(session, task, task.served_version)


def list_versions(session: Session, task: TaskRow) -> Sequence[VersionRow]:
    """All versions of the task, oldest first."""
    return session.scalars(select(VersionRow).where(VersionRow.task_id == task.id).order_by(VersionRow.number)).all()


def serve(task: TaskRow, version: VersionRow, now: datetime) -> None:
    """Serve the version, with the instruction and the inventory that it was learned with."""
    task.served_version = version.number
    if version.instruction is not None:
        task.instruction = version.instruction
    if version.inventory is not None:
        task.inventory = version.inventory
    task.updated_at = now
