"""The task catalog: from a name on the wire to an adapter ready for the engine.

Every look-up reads the store, so a promotion by another process holds for the next request. A resolved
task is a snapshot: requests in flight finish on the version they began with.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapters_store.blobs import digest_of
from adapters_store.errors import BlobDamaged, BlobMissing
from adapters_store.errors import NotFound as StoreNotFound
from adapters_store.records import InventoryRecord, TaskRecord, VersionKind, VersionRecord
from adapters_store.store import Store
from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.blobs import adapter_fingerprint, adapter_from_bytes, routing_from_bytes, routing_to_bytes
from server.adapters.cache import AdapterCache, PinnedAdapter
from server.adapters.injection import check_sizes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.engine.request import AdapterHandle
from server.errors import AdapterUnavailable, BackboneMismatch, Conflict, InvalidInput, NotFound
from server.options import merge_options
from server.training.prompts import DEFAULT_PROMPT_FORMAT

BASE = "base"
MEAN = "mu"
RESERVED = frozenset({BASE, MEAN})
_REFERENCE = re.compile(r"([a-z0-9][a-z0-9._-]{0,127})(?:@([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class ResolvedTask:
    """Everything that a request needs of its task. Call `release` when the request is over."""

    task_id: str
    version: int | None = None
    instruction: str = ""
    prompt_format: str = DEFAULT_PROMPT_FORMAT
    defaults: Mapping[str, Any] = field(default_factory=dict)
    pinned: PinnedAdapter | None = None  # None is the bare backbone

    @property
    def handle(self) -> AdapterHandle | None:
        """The adapter as the engine takes it."""
        return None if self.pinned is None else AdapterHandle(self.pinned.key, self.pinned.adapter)

    def release(self) -> None:
        """Let the cache evict the adapter again."""
        if self.pinned is not None:
            self.pinned.release()


class TaskCatalog:
    """Tasks of the store, and inventories of the served backbone kept in memory. Thread-safe; methods block."""

    def __init__(
        self,
        store: Store,
        cache: AdapterCache,
        backbone: Backbone,
        linear_sizes: Mapping[str, tuple[int, int]],
        *,
        preferred_inventories: Sequence[str] = (),
        on_assembly: Callable[[str, float], None] = lambda kind, seconds: None,
    ) -> None:
        self._store = store
        self._cache = cache
        self._backbone = backbone
        self._linear_sizes = dict(linear_sizes)
        self._preferred = tuple(preferred_inventories)
        self._on_assembly = on_assembly
        self._inventories: dict[str, Inventory] = {}  # by digest
        self._prompt_formats: dict[str, str] = {}  # by the inventory's name, which never gets another content
        self._lock = threading.Lock()

    # --- from a name to an adapter ------------------------------------------------------------------------------

    def resolve(self, reference: str) -> ResolvedTask:
        """`task`, `task@version`, `base` or `mu`, its adapter assembled and pinned.

        Raises NotFound for an unknown task or version, Conflict for a task without a served version, and
        AdapterUnavailable when the adapter cannot be assembled.
        """
        if reference == BASE:
            return ResolvedTask(BASE)
        if reference == MEAN:
            return self._resolve_mean()
        task_id, number = parse_reference(reference)
        task = self._task(task_id)
        if number is None and task.served_version is None:
            raise Conflict(
                f"task {task_id!r} has no served version; promote one with POST /tasks/{task_id}/promote",
                param="task_id",
                code="no_served_version",
            )
        version = self._version(task_id, number or task.served_version)
        return ResolvedTask(
            task_id=task_id,
            version=version.number,
            instruction=task.instruction,
            prompt_format=DEFAULT_PROMPT_FORMAT
            if version.inventory is None
            else self._prompt_format_of(version.inventory),
            defaults=task.defaults,
            pinned=self._pin(version),
        )

    def _resolve_mean(self) -> ResolvedTask:
        record = self.served_inventory()
        if record is None:
            raise NotFound("`mu` needs an inventory, and none fits the served backbone; import one", param="task_id")
        inventory = self.inventory(record.digest)
        pinned = self._cache.get(f"{record.digest}:mu", lambda: self._timed("mu", lambda: mean_adapter(inventory)))
        return ResolvedTask(MEAN, prompt_format=inventory.prompt_format, pinned=pinned)

    def _pin(self, version: VersionRecord) -> PinnedAdapter:
        digests = [digest for digest in (version.inventory_digest, version.blob_digest) if digest is not None]
        key = ":".join([*digests, version.kind])
        try:
            return self._cache.get(key, lambda: self._timed(version.kind, lambda: self._build(version)))
        except (BlobMissing, BlobDamaged) as error:
            raise AdapterUnavailable(
                f"the adapter of {version.task_id}@{version.number} cannot be assembled: {error}",
                param="task_id",
                code="blob_damaged",
            ) from error
        except (InvalidInput, BackboneMismatch) as error:
            raise AdapterUnavailable(
                f"the adapter of {version.task_id}@{version.number} cannot be assembled: {error.message}",
                param="task_id",
            ) from error

    def _build(self, version: VersionRecord) -> Adapter:
        if version.kind == "adapter":
            assert version.blob_digest is not None
            data = self._store.blobs.get(version.blob_digest)
            check_fingerprint("its adapter", adapter_fingerprint(data), self._backbone)
            adapter = adapter_from_bytes(data)
            check_sizes(self._linear_sizes, {n: (w.A.shape[0], w.B.shape[1]) for n, w in adapter.weights.items()})
            return adapter
        assert version.inventory_digest is not None
        inventory = self.inventory(version.inventory_digest)
        if version.kind == "mu":
            return mean_adapter(inventory)
        assert version.blob_digest is not None
        return assemble(inventory, routing_from_bytes(self._store.blobs.get(version.blob_digest)))

    def _timed(self, kind: str, build: Callable[[], Adapter]) -> Adapter:
        start_s = time.perf_counter()
        adapter = build()
        self._on_assembly(kind, time.perf_counter() - start_s)
        return adapter

    def prompt_format(self, inventory: InventoryRecord | None) -> str:
        """How prompts of a task over this inventory are rendered; None is a task without one."""
        return self._prompt_format_of(None if inventory is None else inventory.name)

    def _prompt_format_of(self, name: str | None) -> str:
        if name is None:
            return DEFAULT_PROMPT_FORMAT
        known = self._prompt_formats.get(name)
        if known is None:
            known = str(self._store.get_inventory(name).metadata.get("prompt_format", DEFAULT_PROMPT_FORMAT))
            self._prompt_formats[name] = known
        return known

    # --- inventories --------------------------------------------------------------------------------------------

    def served_inventory(self) -> InventoryRecord | None:
        """The inventory of `mu` and of new tasks: the preferred one, else the only one that fits; None if neither."""
        fitting = {record.name: record for record in self._store.list_inventories() if self.fits(record)}
        for name in self._preferred:
            if name in fitting:
                return fitting[name]
        return next(iter(fitting.values())) if len(fitting) == 1 else None

    def fits(self, record: InventoryRecord) -> bool:
        """Whether the inventory was made for the served backbone."""
        return record.backbone_fingerprint == self._backbone.fingerprint

    def pick_inventory(self, name: str | None) -> InventoryRecord:
        """The named inventory, or the served one for None.

        Raises NotFound, BackboneMismatch with both fingerprints, or InvalidInput when None has no answer.
        """
        if name is None:
            served = self.served_inventory()
            if served is None:
                raise InvalidInput("no inventory is served, so name one", param="inventory")
            return served
        try:
            record = self._store.get_inventory(name)
        except StoreNotFound:
            raise NotFound(f"there is no inventory {name!r}; GET /inventories lists them", param="inventory") from None
        check_fingerprint(f"the inventory {name!r}", record.backbone_fingerprint, self._backbone)
        return record

    def read_inventory(self, record: InventoryRecord) -> Inventory:
        """A stored inventory of any backbone. Raises AdapterUnavailable when its blob is damaged."""
        return Inventory.from_bytes(self._store.blobs.get(record.digest))

    def inventory(self, digest: str) -> Inventory:
        """The inventory of a blob, read once and kept.

        Raises BackboneMismatch, BlobMissing or BlobDamaged.
        """
        with self._lock:
            held = self._inventories.get(digest)
            if held is None:
                held = Inventory.from_bytes(self._store.blobs.get(digest))
                check_fingerprint("its inventory", held.backbone_fingerprint, self._backbone)
                self._inventories[digest] = held
            return held

    # --- tasks --------------------------------------------------------------------------------------------------

    def register(
        self,
        task_id: str,
        *,
        instruction: str,
        defaults: Mapping[str, Any],
        metadata: Mapping[str, Any],
        inventory: str | None,
        routing: Sequence[Sequence[Sequence[float]]] | None,
    ) -> tuple[TaskRecord, bool]:
        """Create or replace a task whose served version is a routing [L][h][K], or the mean for None.

        Returns the task and whether it is new. The same content as is served makes no new version.
        """
        merge_options({}, defaults, "defaults")
        record = self.pick_inventory(inventory)
        blob = None if routing is None else self._routing_blob(record, routing)
        try:
            before: TaskRecord | None = self._store.get_task(task_id)
        except StoreNotFound:
            before = None
        kind: VersionKind = "mu" if blob is None else "routing"
        fields: dict[str, Any] = {
            "instruction": instruction,
            "defaults": dict(defaults),
            "inventory": record.name,
            "metadata": dict(metadata),
        }
        if before is not None and self._serves(before, kind, record.digest, blob):
            return self._store.put_task(task_id, **fields), False
        self._store.register_task(task_id, **fields, kind=kind, blob=blob)
        return self._store.get_task(task_id), before is None

    def change(
        self,
        task_id: str,
        *,
        instruction: str | None,
        defaults: Mapping[str, Any] | None,
        metadata: Mapping[str, Any] | None,
    ) -> TaskRecord:
        """Replace what is not None. Raises NotFound or InvalidInput."""
        if defaults is not None:
            merge_options({}, defaults, "defaults")
        return self._store.update_task(
            task_id,
            instruction=instruction,
            defaults=None if defaults is None else dict(defaults),
            metadata=None if metadata is None else dict(metadata),
        )

    def _serves(self, task: TaskRecord, kind: VersionKind, inventory_digest: str, blob: bytes | None) -> bool:
        if task.served_version is None:
            return False
        served = self._store.get_version(task.id, task.served_version)
        same_blob = served.blob_digest == (None if blob is None else digest_of(blob))
        return served.kind == kind and served.inventory_digest == inventory_digest and same_blob

    def _routing_blob(self, record: InventoryRecord, routing: Sequence[Sequence[Sequence[float]]]) -> bytes:
        expected = self.inventory(record.digest).routing_shape
        problem = f"routing must be [linear][head][skill] of the shape {list(expected)} for inventory {record.name!r}"
        try:
            logits = torch.tensor(routing, dtype=torch.float32)
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"{problem}; its lists are not all of the same length", param="routing") from error
        if tuple(logits.shape) != expected:
            raise InvalidInput(f"{problem}, not {list(logits.shape)}", param="routing")
        if not logits.half().isfinite().all():
            raise InvalidInput("routing holds a logit beyond ±65504, the largest that is stored", param="routing")
        return routing_to_bytes(logits, record.digest)

    def _task(self, task_id: str) -> TaskRecord:
        try:
            return self._store.get_task(task_id)
        except StoreNotFound:
            raise NotFound(f"there is no task {task_id!r}; GET /tasks lists them", param="task_id") from None

    def _version(self, task_id: str, number: int | None) -> VersionRecord:
        try:
            return self._store.get_version(task_id, number)
        except StoreNotFound:
            raise NotFound(
                f"task {task_id!r} has no version {number}; GET /tasks/{task_id} lists them", param="task_id"
            ) from None


def parse_reference(reference: str) -> tuple[str, int | None]:
    """("task", 3) of `task@3`, ("task", None) of `task`. Raises NotFound when no task can have that name."""
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise NotFound(f"there is no task {reference!r}; GET /tasks lists them", param="task_id")
    return match[1], None if match[2] is None else int(match[2])


def check_not_reserved(task_id: str) -> None:
    """Raise InvalidInput for the ids that the server answers itself."""
    if task_id in RESERVED:
        raise InvalidInput(
            f"the id {task_id!r} is reserved (base: no adapter, mu: the inventory's mean); choose another",
            param="task_id",
            code="reserved_id",
        )


def check_fingerprint(what: str, fingerprint: str, backbone: Backbone) -> None:
    """Raise BackboneMismatch with both fingerprints unless `fingerprint` is the backbone's."""
    if fingerprint != backbone.fingerprint:
        raise BackboneMismatch(
            f"{what} was made for a backbone with the fingerprint {fingerprint}; "
            f"{backbone.name} has {backbone.fingerprint}. Serve that backbone, or use an inventory of this one"
        )
