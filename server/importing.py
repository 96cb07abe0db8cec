"""Reading an inventory from a user's files, and checking one in the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from adapters_store.store import Store
from server.adapters.assembly import assemble
from server.adapters.injection import linear_sizes
from server.adapters.inventory import Inventory
from server.adapters.peft_format import TargetBackbone, inventory_from_loras, peft_type, read_lora, read_poly
from server.backbone import Backbone, load_backbone
from server.errors import AdapterUnavailable, InvalidInput
from server.inventories import Imported, import_inventory
from server.settings import Settings
from server.training.prompts import DEFAULT_PROMPT_FORMAT


def import_paths(
    store: Store, settings: Settings, paths: Sequence[Path], name: str, task_names: Sequence[str] | None
) -> Imported:
    """Import an inventory file, a PEFT Poly directory, or several PEFT LoRA directories for the set backbone.

    Raises InvalidInput for files that cannot be used, BackboneMismatch, and the store's Conflict.
    """
    backbone = load_backbone(settings.backbone, settings.data_dir, settings.device)
    sizes = linear_sizes(backbone.model)
    return import_inventory(store, name, _document(paths, name, task_names, backbone, sizes), backbone, sizes)


def check_inventory(store: Store, name: str) -> list[str]:
    """Read an inventory and assemble each of its tasks; returns their names.

    Raises NotFound, BlobMissing or BlobDamaged, and AdapterUnavailable naming the task that does not assemble.
    """
    record = store.get_inventory(name)
    inventory = Inventory.from_bytes(store.blobs.get(record.digest))
    for task, logits in inventory.routings.items():
        adapter = assemble(inventory, logits)
        if not all(torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all() for pair in adapter.weights.values()):
            raise AdapterUnavailable(f"the task {task!r} of {name!r} has weights that are not finite; import it again")
    return list(inventory.routings)


def _document(
    paths: Sequence[Path],
    name: str,
    task_names: Sequence[str] | None,
    backbone: Backbone,
    sizes: dict[str, tuple[int, int]],
) -> bytes:
    target = TargetBackbone(backbone.name, backbone.fingerprint, DEFAULT_PROMPT_FORMAT, sizes)
    if len(paths) == 1 and paths[0].is_file():
        if task_names is not None:
            raise InvalidInput("--task-names is for PEFT checkpoints; an inventory file names its own tasks")
        return paths[0].read_bytes()
    if any(path.is_file() for path in paths):
        raise InvalidInput("give one inventory file, one PEFT Poly directory, or several PEFT LoRA directories")
    types = {path: peft_type(path) for path in paths}
    if len(paths) == 1 and types[paths[0]] == "POLY":
        return read_poly(paths[0], target, name=name, task_names=task_names).to_bytes(torch.float32)
    others = [f"{path} ({kind})" for path, kind in types.items() if kind != "LORA"]
    if others:
        raise InvalidInput(f"only PEFT LoRA directories can be imported together; these are not: {', '.join(others)}")
    names = [path.resolve().name for path in paths] if task_names is None else list(task_names)
    if len(names) != len(paths) or len(set(names)) != len(names):
        raise InvalidInput(f"{len(paths)} LoRA directories need as many different task names, not {names}")
    adapters = {task: read_lora(path, sizes) for task, path in zip(names, paths, strict=True)}
    return inventory_from_loras(adapters, target).to_bytes(torch.float32)
