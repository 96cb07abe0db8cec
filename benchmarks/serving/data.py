"""A data directory for a server under test: a random inventory and so many tasks routed over it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from common import random_inventory

from adapters_store.blobs import digest_of
from adapters_store.records import TaskSeed
from adapters_store.store import Store
from server.adapters.blobs import routing_to_bytes
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.inventories import catalog_fields
from server.training.prompts import DEFAULT_PROMPT_FORMAT

INVENTORY = "benchmark"


def task_id(number: int) -> str:
    return f"task-{number}"


def make_inventory(options: Namespace, backbone: Backbone) -> Inventory:
    """K skills of rank r and h heads over all linears, without tasks of its own."""
    inventory = random_inventory(
        backbone, tasks=0, skills=options.skills, heads=options.heads, rank=options.rank, alpha=1.0
    )
    return replace(inventory, prompt_format=DEFAULT_PROMPT_FORMAT)


def routings(inventory: Inventory, tasks: int) -> Iterator[torch.Tensor]:
    """Random logits (L, h, K), the same for the same task number however many there are."""
    random = torch.Generator().manual_seed(2)
    return (3 * torch.randn(inventory.routing_shape, generator=random) for _ in range(tasks))


def prepare(folder: Path, cache_dir: Path, inventory: Inventory, tasks: int) -> None:
    """A new data directory with the inventory and `tasks` tasks, registered as an import does, in one transaction.

    The backbone's prepared files are those of `cache_dir`.
    """
    folder.mkdir(parents=True)
    for shared in ("backbones", "fingerprints"):
        (cache_dir / shared).mkdir(parents=True, exist_ok=True)
        (folder / shared).symlink_to((cache_dir / shared).resolve())
    data = inventory.to_bytes()
    digest = digest_of(data)
    seeds = [
        TaskSeed(id=task_id(number), instruction="", blob=routing_to_bytes(logits, digest))
        for number, logits in enumerate(routings(inventory, tasks))
    ]
    with closing(Store.open(folder)) as store:
        store.add_inventory(INVENTORY, data, tasks=seeds, **catalog_fields(inventory))
