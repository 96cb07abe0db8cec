"""Putting an inventory into the store together with the tasks that it brings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.blobs import digest_of
from adapters_store.errors import NotFound as StoreNotFound
from adapters_store.records import InventoryRecord, TaskSeed
from adapters_store.store import Store
from server.adapters.blobs import routing_to_bytes
from server.adapters.injection import check_sizes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.logs import get_logger
from server.tasks import check_fingerprint, check_not_reserved

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "inventories"

log = get_logger(__name__)


@dataclass(frozen=True)
class Imported:
    """An inventory in the store, and the tasks that came with it."""

    record: InventoryRecord
    tasks: tuple[str, ...]


def import_inventory(
    store: Store,
    name: str,
    data: bytes,
    backbone: Backbone,
    linear_sizes: dict[str, tuple[int, int]],
    *,
    skip_tasks: Collection[str] = (),
) -> Imported:
    """Add an inventory document and its tasks to the store, all or nothing; twice the same is once.

    Raises InvalidInput when it is no inventory or does not fit, BackboneMismatch with both fingerprints, and
    the store's Conflict for a name or task id that is taken. Tasks in `skip_tasks` are left out.
    """
    inventory = Inventory.from_bytes(data)
    check_fingerprint(f"the inventory {name!r}", inventory.backbone_fingerprint, backbone)
    check_sizes(linear_sizes, inventory.linear_sizes)
    digest = digest_of(data)
    seeds = []
    for task_id, logits in inventory.routings.items():
        if task_id in skip_tasks:
            continue
        check_not_reserved(task_id)
        about = inventory.tasks.get(task_id)
        details = {} if about is None else {"licence": about.licence, "source": about.source}
        seeds.append(
            TaskSeed(
                id=task_id,
                instruction="" if about is None else about.instruction,
                blob=routing_to_bytes(logits, digest, logits.dtype),  # an imported task must stay exact
                metadata={key: value for key, value in details.items() if value},
            )
        )
    record = store.add_inventory(
        name,
        data,
        tasks=seeds,
        **catalog_fields(inventory),
    )
    return Imported(record, tuple(seed.id for seed in seeds))


def catalog_fields(inventory: Inventory) -> dict[str, Any]:
    """What the catalog keeps of an inventory beside its document."""
    return {
        "backbone_fingerprint": inventory.backbone_fingerprint,
        "num_skills": inventory.num_skills,
        "num_heads": inventory.num_heads,
        "rank": inventory.rank,
        "alpha": inventory.alpha,
        "metadata": {
            "backbone_name": inventory.backbone_name,
            "prompt_format": inventory.prompt_format,
            "training": dict(inventory.training),
        },
    }


def bundled_names(folder: Path = BUNDLED_FOLDER) -> list[str]:
    """The names of the bundled inventories, whatever backbone they are for."""
    return [path.stem for path in sorted(folder.glob("*.safetensors"))]


def import_bundled(
    store: Store, backbone: Backbone, linear_sizes: dict[str, tuple[int, int]], folder: Path = BUNDLED_FOLDER
) -> None:
    """Import the bundled inventories that fit the backbone and are not in the store.

    A task that a user already made under one of their names stays the user's.
    """
    for name in bundled_names(folder):
        if _is_stored(store, name):
            continue
        data = (folder / f"{name}.safetensors").read_bytes()
        inventory = Inventory.from_bytes(data)
        if inventory.backbone_fingerprint != backbone.fingerprint:
            continue
        taken = [task for task in inventory.routings if _is_task(store, task)]
        if taken:
            log.warning(
                "these tasks exist and stay as they are", action="inventory.import", inventory=name, tasks=taken
            )
        import_inventory(store, name, data, backbone, linear_sizes, skip_tasks=taken)
        log.info("imported the bundled inventory", action="inventory.import", inventory=name)


def _is_stored(store: Store, name: str) -> bool:
    try:
        store.get_inventory(name)
    except StoreNotFound:
        return False
    return True


def _is_task(store: Store, task_id: str) -> bool:
    try:
        store.get_task(task_id)
    except StoreNotFound:
        return False
    return True
