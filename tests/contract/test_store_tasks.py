from __future__ import annotations

import pytest

from adapters_store import Conflict, InvalidValue, NotFound


def put(store, task_id, **changes):
    fields = {"instruction": "do it", "defaults": {}, "inventory": None, "metadata": {}} | changes
    return store.put_task(task_id, **fields)


def test_a_task_comes_back_as_it_was_put(store, clock):
    put_record = put(store, "t", instruction="Répète ☂", defaults={"temperature": 0.5}, metadata={"owner": "me"})
    assert put_record == store.get_task("t")
    assert put_record.instruction == "Répète ☂"
    assert put_record.defaults == {"temperature": 0.5}
    assert put_record.served_version is None
    assert put_record.created_at == put_record.updated_at == clock.now
    assert put_record.created_at.tzinfo is not None


def test_putting_again_replaces_all_but_versions_and_creation(store, clock):
    first = put(store, "t", defaults={"seed": 1}, metadata={"a": 1})
    store.add_version(
        "t", kind="adapter", inventory=None, blob=b"x", method=None, job_id=None, metrics={}, promote=True
    )
    clock.advance(10)
    second = put(store, "t", instruction="other")
    assert (second.instruction, second.defaults, second.metadata) == ("other", {}, {})
    assert second.created_at == first.created_at
    assert second.updated_at == clock.now
    assert second.served_version == 1
    assert len(store.list_versions("t")) == 1


def test_update_changes_what_is_given(store, clock):
    put(store, "t", defaults={"seed": 1}, metadata={"a": 1})
    clock.advance(1)
    assert store.update_task("t", instruction="new").defaults == {"seed": 1}
    assert store.update_task("t", defaults={}).instruction == "new"
    updated = store.update_task("t", metadata={"b": [1, None]})
    assert updated == store.get_task("t")
    assert (updated.instruction, updated.defaults, updated.metadata) == ("new", {}, {"b": [1, None]})
    assert updated.updated_at == clock.now


def test_a_record_does_not_change_with_the_callers_objects(store):
    defaults = {"stop": ["a"]}
    record = put(store, "t", defaults=defaults)
    defaults["stop"].append("b")
    assert record.defaults == {"stop": ["a"]} == store.get_task("t").defaults


@pytest.mark.parametrize("task_id", ["absent", "", "Bad Id", "nul\x00", "half \ud800", "base"])
def test_an_unknown_task_is_not_found(store, task_id):
    calls = [
        lambda: store.get_task(task_id),
        lambda: store.update_task(task_id, instruction="x"),
        lambda: store.delete_task(task_id),
        lambda: store.list_versions(task_id),
        lambda: store.get_version(task_id),
        lambda: store.promote(task_id, 1),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="there is no task"):
            call()


def test_reserved_and_malformed_ids_cannot_be_put(store):
    for task_id in ("base", "mu", "UPPER", "a/b", "t@1", ""):
        with pytest.raises(InvalidValue, match=r"task id|reserved"):
            put(store, task_id)
    assert store.count_tasks() == 0


def test_an_unknown_inventory_is_refused(store):
    with pytest.raises(NotFound, match="no inventory 'nowhere'"):
        put(store, "t", inventory="nowhere")
    assert store.count_tasks() == 0


@pytest.mark.parametrize("text", ["nul \x00", "half \ud800"])
def test_texts_that_no_database_keeps_are_refused(store, text):
    with pytest.raises(InvalidValue) as caught:
        put(store, "t", instruction=text)
    assert caught.value.field == "instruction"
    put(store, "t")
    with pytest.raises(InvalidValue):
        store.update_task("t", instruction=text)


def test_json_keeps_what_json_can_hold(store):
    metadata = {"nan": float("nan"), "pair": (1, 2), "nul": "\x00", "half": "\ud800", "deep": [{"a": float("inf")}]}
    record = put(store, "t", metadata=metadata)
    assert record.metadata == {"nan": None, "pair": [1, 2], "nul": "\x00", "half": "\ud800", "deep": [{"a": None}]}
    assert store.get_task("t") == record
    with pytest.raises(InvalidValue, match="metadata cannot be kept as JSON"):
        put(store, "t", metadata={"bytes": b"x"})


def test_deleting_takes_the_versions_along(store):
    put(store, "t")
    store.add_version(
        "t", kind="adapter", inventory=None, blob=b"x", method=None, job_id=None, metrics={}, promote=True
    )
    store.delete_task("t")
    with pytest.raises(NotFound):
        store.get_task("t")
    put(store, "t")
    assert store.list_versions("t") == []
    assert store.get_task("t").served_version is None


def test_a_task_that_a_job_adapts_cannot_be_deleted(store):
    put(store, "t")
    job, _ = store.create_job(task_id="t", method="mhr", request={})
    with pytest.raises(Conflict, match=f"{job.id} adapts the task 't'"):
        store.delete_task("t")
    store.request_cancel(job.id)
    store.delete_task("t")
    assert store.get_job(job.id).status == "cancelled"


def test_pages_cover_all_tasks_once_in_order(store):
    names = sorted(f"task{number:02d}" for number in range(25))
    for name in reversed(names):
        put(store, name)
    seen, cursor, pages = [], None, 0
    while True:
        page = store.list_tasks(10, cursor)
        seen += [task.id for task in page.items]
        pages += 1
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert seen == names
    assert pages == 3


def test_the_last_full_page_has_no_cursor(store):
    for name in ("a", "b"):
        put(store, name)
    assert store.list_tasks(2).next_cursor is None
    assert store.list_tasks(1).next_cursor is not None


def test_a_cursor_outlives_its_task(store):
    for name in ("a", "b", "c"):
        put(store, name)
    cursor = store.list_tasks(2).next_cursor
    store.delete_task("b")
    assert [task.id for task in store.list_tasks(2, cursor).items] == ["c"]


def test_ids_sort_by_byte_on_every_backend(store):
    names = ["a-1", "a.1", "a1", "a_1", "aa", "b"]
    for name in names:
        put(store, name)
    assert [task.id for task in store.list_tasks().items] == sorted(names)


def test_a_prefix_is_taken_literally(store):
    for name in ("task_1", "task_10", "taskx1", "tas", "z"):
        put(store, name)
    assert [task.id for task in store.list_tasks(prefix="task_").items] == ["task_1", "task_10"]
    assert [task.id for task in store.list_tasks(prefix="task_1", limit=1).items] == ["task_1"]
    assert len(store.list_tasks(prefix="").items) == 5
    assert store.list_tasks(prefix="%").items == []
    assert store.list_tasks(prefix="nul\x00").items == []


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_a_page_size_out_of_range_is_refused(store, limit):
    with pytest.raises(InvalidValue, match="use 1 to 1000"):
        store.list_tasks(limit)
    with pytest.raises(InvalidValue, match="use 1 to 1000"):
        store.list_jobs(limit)


def test_tasks_are_counted(store):
    assert store.count_tasks() == 0
    put(store, "a")
    put(store, "b")
    assert store.count_tasks() == 2
