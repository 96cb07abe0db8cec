from __future__ import annotations

import pytest

from adapters_store import InvalidValue, NotFound

SHAPE = {
    "backbone_fingerprint": "f",
    "num_skills": 2,
    "num_heads": 2,
    "rank": 2,
    "alpha": 1.0,
    "metadata": {},
    "tasks": (),
}


@pytest.fixture
def task(store):
    store.add_inventory("small", b"tensors", **SHAPE)
    return store.put_task("t", instruction="first", defaults={}, inventory="small", metadata={})


def add(store, blob=b"x", **changes):
    fields = {
        "kind": "routing",
        "inventory": "small",
        "blob": blob,
        "method": "mhr-z",
        "job_id": None,
        "metrics": {"rouge": 0.5},
        "promote": False,
    }
    return store.add_version("t", **(fields | changes))


def test_versions_count_from_one_and_keep_what_they_are(store, task, clock):
    first, second = add(store, b"one"), add(store, b"two")
    assert (first.number, second.number) == (1, 2)
    assert store.list_versions("t") == [first, second]
    assert store.get_version("t", 1) == first
    assert first.inventory_digest == store.get_inventory("small").digest
    assert (first.kind, first.method, first.metrics, first.size_bytes) == ("routing", "mhr-z", {"rouge": 0.5}, 3)
    assert first.created_at == clock.now
    assert store.blobs.get(second.blob_digest) == b"two"


def test_nothing_is_served_until_a_version_is_promoted(store, task):
    add(store)
    assert store.get_task("t").served_version is None
    with pytest.raises(NotFound, match="serves no version yet"):
        store.get_version("t")
    assert store.promote("t", 1).served_version == 1
    assert store.get_version("t").number == 1


def test_adding_may_promote_at_once(store, task):
    add(store)
    add(store, b"y", promote=True)
    assert store.get_version("t").number == 2


def test_promotion_can_go_back(store, task):
    add(store, promote=True)
    add(store, b"y", promote=True)
    assert store.promote("t", 1).served_version == 1


def test_promotion_brings_the_instruction_the_version_was_learned_with(store, task):
    add(store, promote=True, instruction="first")
    add(store, b"y", instruction="second")
    assert store.get_task("t").instruction == "first"
    assert store.promote("t", 2).instruction == "second"
    assert store.promote("t", 1).instruction == "first"


def test_promotion_of_a_version_without_an_instruction_keeps_the_tasks_own(store, task):
    add(store, promote=True)
    assert store.get_task("t").instruction == "first"


def test_promotion_brings_the_inventory(store, task):
    store.add_inventory("other", b"others", **SHAPE)
    add(store, inventory="other", promote=True)
    assert store.get_task("t").inventory == "other"


@pytest.mark.parametrize("number", [0, -1, 3, 2**31, 10**30])
def test_an_unknown_version_is_not_found(store, task, number):
    add(store)
    with pytest.raises(NotFound, match=f"'t' has no version {number}"):
        store.get_version("t", number)
    with pytest.raises(NotFound):
        store.promote("t", number)


def test_the_mean_needs_no_blob(store, task):
    version = add(store, kind="mu", blob=None, promote=True)
    assert (version.blob_digest, version.size_bytes, version.kind) == (None, 0, "mu")
    assert store.verify() == []


def test_an_adapter_of_its_own_needs_no_inventory(store, task):
    version = add(store, kind="adapter", inventory=None)
    assert (version.inventory, version.inventory_digest) == (None, None)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kind": "poly"}, "kind"),
        ({"kind": "routing", "blob": None}, "blob"),
        ({"kind": "adapter", "blob": None}, "blob"),
        ({"kind": "mu", "blob": b"x"}, "blob"),
        ({"kind": "routing", "inventory": None}, "inventory"),
        ({"kind": "mu", "blob": None, "inventory": None}, "inventory"),
        ({"instruction": "nul \x00"}, "instruction"),
    ],
)
def test_a_version_that_could_not_be_served_is_refused(store, task, changes, field):
    with pytest.raises(InvalidValue) as caught:
        add(store, **changes)
    assert caught.value.field == field
    assert store.list_versions("t") == []


def test_a_version_over_an_unknown_inventory_is_refused(store, task):
    with pytest.raises(NotFound, match="no inventory 'nowhere'"):
        add(store, inventory="nowhere")
    assert store.list_versions("t") == []


def test_a_version_of_an_unknown_task_is_refused(store):
    with pytest.raises(NotFound, match="no task 't'"):
        add(store, kind="adapter", inventory=None)


def test_registering_puts_adds_and_serves_in_one(store, task):
    version = store.register_task(
        "new",
        instruction="say it",
        defaults={"temperature": 0.1},
        inventory="small",
        metadata={"by": "me"},
        kind="mu",
        blob=None,
    )
    task = store.get_task("new")
    assert (task.served_version, task.instruction, task.defaults, task.metadata) == (
        1,
        "say it",
        {"temperature": 0.1},
        {"by": "me"},
    )
    assert store.get_version("new") == version


def test_registering_again_adds_a_version_and_keeps_the_old(store, task):
    fields = {"defaults": {}, "inventory": "small", "metadata": {}, "kind": "routing"}
    store.register_task("new", instruction="one", blob=b"1", **fields)
    second = store.register_task("new", instruction="two", blob=b"2", **fields)
    assert second.number == 2
    assert store.get_task("new").instruction == "two"
    assert store.promote("new", 1).instruction == "one"


def test_registering_over_an_unknown_inventory_keeps_nothing(store):
    with pytest.raises(NotFound):
        store.register_task("new", instruction="", defaults={}, inventory="nowhere", metadata={}, kind="mu", blob=None)
    assert store.count_tasks() == 0


def test_another_store_sees_a_promotion_at_once(store, task, open_store):
    other = open_store()
    add(store, promote=True)
    assert other.get_version("t").number == 1
    add(store, b"y", promote=True)
    assert other.get_version("t").number == 2
