from __future__ import annotations

from typing import Any

import pytest

from adapters_store import Conflict, InvalidValue, NotFound, Store, TaskSeed

SHAPE: dict[str, Any] = {
    "backbone_fingerprint": "backbone-1",
    "num_skills": 8,
    "num_heads": 4,
    "rank": 2,
    "alpha": 16.0,
    "metadata": {"linears": ["q", "v"]},
}


def seeds(*task_ids: str) -> list[TaskSeed]:
    return [TaskSeed(task_id, f"do {task_id}", task_id.encode(), {"source": task_id}) for task_id in task_ids]


def test_an_inventory_comes_back_as_it_was_added(store, clock):
    added = store.add_inventory("small", b"tensors", tasks=[], **SHAPE)
    assert added == store.get_inventory("small")
    assert added.size_bytes == len(b"tensors")
    assert added.created_at == clock.now
    assert (added.num_skills, added.num_heads, added.rank, added.alpha) == (8, 4, 2, 16.0)
    assert added.metadata == {"linears": ["q", "v"]}
    assert store.blobs.get(added.digest) == b"tensors"


def test_its_tasks_come_with_it_and_serve_version_one(store):
    inventory = store.add_inventory("small", b"tensors", tasks=seeds("b", "a"), **SHAPE)
    assert [task.id for task in store.list_tasks(10).items] == ["a", "b"]
    task = store.get_task("a")
    assert (task.instruction, task.inventory, task.served_version, task.metadata) == (
        "do a",
        "small",
        1,
        {"source": "a"},
    )
    version = store.get_version("a")
    assert (version.number, version.kind, version.inventory) == (1, "routing", "small")
    assert version.inventory_digest == inventory.digest
    assert version.instruction == "do a"
    assert store.blobs.get(version.blob_digest) == b"a"
    assert version.size_bytes == 1


def test_tasks_may_share_one_routing(store):
    store.add_inventory("small", b"tensors", tasks=[TaskSeed("a", "", b"same"), TaskSeed("b", "", b"same")], **SHAPE)
    assert store.get_version("a").blob_digest == store.get_version("b").blob_digest
    assert len(list(store.blobs.digests())) == 2


def test_adding_the_same_again_changes_nothing(store, clock):
    first = store.add_inventory("small", b"tensors", tasks=seeds("a"), **SHAPE)
    store.update_task("a", instruction="changed since")
    clock.advance(5)
    assert store.add_inventory("small", b"tensors", tasks=seeds("a", "new"), **SHAPE) == first
    assert store.get_task("a").instruction == "changed since"
    assert store.count_tasks() == 1


def test_adding_the_same_again_does_not_bring_back_a_deleted_task(store):
    store.add_inventory("small", b"tensors", tasks=seeds("a", "b"), **SHAPE)
    store.delete_task("a")
    store.add_inventory("small", b"tensors", tasks=seeds("a", "b"), **SHAPE)
    assert [task.id for task in store.list_tasks().items] == ["b"]


def test_adding_the_same_again_repairs_damaged_blobs(store):
    inventory = store.add_inventory("small", b"tensors", tasks=seeds("a"), **SHAPE)
    routing = store.get_version("a").blob_digest
    store.blobs.path(inventory.digest).write_bytes(b"rotten!")
    store.blobs.path(routing).unlink()
    assert len(store.verify()) == 2
    store.add_inventory("small", b"tensors", tasks=seeds("a"), **SHAPE)
    assert store.verify() == []


def test_the_same_name_with_other_content_is_a_conflict(store):
    store.add_inventory("small", b"tensors", tasks=[], **SHAPE)
    with pytest.raises(Conflict, match="'small' exists with other content"):
        store.add_inventory("small", b"others", tasks=seeds("a"), **SHAPE)
    assert store.count_tasks() == 0


def test_a_taken_task_id_is_named_and_nothing_is_kept(store):
    store.put_task("b", instruction="mine", defaults={}, inventory=None, metadata={})
    with pytest.raises(Conflict, match="task 'b' exists already"):
        store.add_inventory("small", b"tensors", tasks=seeds("a", "b", "c"), **SHAPE)
    assert store.list_inventories() == []
    assert [task.id for task in store.list_tasks().items] == ["b"]
    assert store.get_task("b").instruction == "mine"


def test_a_task_id_that_occurs_twice_is_a_conflict(store):
    with pytest.raises(Conflict, match="'a' occurs twice"):
        store.add_inventory("small", b"tensors", tasks=seeds("a", "a"), **SHAPE)


@pytest.mark.parametrize("task_id", ["base", "mu", "", "A", "a b", "-a", "a" * 129, "tâche", "a\n"])
def test_bad_and_reserved_task_ids_are_refused(store, task_id):
    with pytest.raises(InvalidValue) as caught:
        store.add_inventory("small", b"tensors", tasks=seeds(task_id), **SHAPE)
    assert caught.value.field == "task_id"
    assert store.list_inventories() == []


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden", "n" * 129])
def test_bad_inventory_names_are_refused(store, name):
    with pytest.raises(InvalidValue, match="inventory name"):
        store.add_inventory(name, b"tensors", tasks=[], **SHAPE)


def test_inventories_are_listed_by_name(store):
    for name in ("b", "a", "C"):
        store.add_inventory(name, name.encode(), tasks=[], **SHAPE)
    assert [inventory.name for inventory in store.list_inventories()] == ["C", "a", "b"]


@pytest.mark.parametrize("name", ["absent", "", "nul\x00", "half \ud800"])
def test_an_unknown_inventory_is_not_found(store: Store, name):
    with pytest.raises(NotFound, match="there is no inventory"):
        store.get_inventory(name)
