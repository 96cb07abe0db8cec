from __future__ import annotations

import os
import time

import pytest

from adapters_store import BlobDamaged, BlobMissing, Conflict, Store, TaskSeed

SHAPE = {
    "backbone_fingerprint": "f",
    "num_skills": 2,
    "num_heads": 2,
    "rank": 2,
    "alpha": 1.0,
    "metadata": {},
}
HOURS_AGO = 2 * 3600


@pytest.fixture
def filled(store):
    """An inventory with tasks a and b, and a job that made a@2."""
    store.add_inventory(
        "small", b"tensors" * 100, tasks=[TaskSeed("a", "A", b"routing a"), TaskSeed("b", "B", b"routing b")], **SHAPE
    )
    job, _ = store.create_job(task_id="a", method="mhr-z", request={"n": 1})
    store.claim_job("w", 30)
    store.save_checkpoint(job.id, b"half way")
    store.complete_job_with_version(
        job.id,
        "w",
        kind="routing",
        inventory="small",
        blob=b"routing a, better",
        instruction="A",
        defaults={},
        metadata={},
        promote=True,
        metrics={},
    )
    return store


def age(path, seconds=HOURS_AGO):
    then = time.time() - seconds
    os.utime(path, (then, then))


def age_all(store):
    for digest in store.blobs.digests():
        age(store.blobs.path(digest))


# ---- verify


def test_a_sound_store_has_no_damage(filled):
    assert filled.verify() == []


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"?" + path.read_bytes()[1:]), "altered"),
        (lambda path: path.write_bytes(path.read_bytes() + b"?"), "altered"),
    ],
)
def test_damage_is_named_with_digest_path_and_users(filled, harm, problem):
    digest = filled.get_version("a").blob_digest
    harm(filled.blobs.path(digest))
    (damage,) = filled.verify()
    assert (damage.digest, damage.path, damage.problem) == (digest, filled.blobs.path(digest), problem)
    assert damage.used_by == ("a@2",)
    assert str(damage) == f"{problem}: {damage.path} (used by a@2)"
    with pytest.raises(BlobMissing if problem == "missing" else BlobDamaged, match=str(damage.path)):
        filled.blobs.get(digest)


def test_damage_names_all_users_of_a_shared_blob(filled):
    for task_id in ("x", "y"):
        filled.register_task(
            task_id, instruction="", defaults={}, inventory="small", metadata={}, kind="routing", blob=b"routing b"
        )
    filled.blobs.path(filled.get_version("b").blob_digest).unlink()
    (damage,) = filled.verify()
    assert damage.used_by == ("b@1", "x@1", "y@1")


def test_damage_of_an_inventory_names_it(filled):
    path = filled.blobs.path(filled.get_inventory("small").digest)
    path.write_bytes(path.read_bytes()[:10])
    (damage,) = filled.verify()
    assert (damage.problem, damage.used_by) == ("truncated", ("inventory small",))


def test_a_blob_that_cannot_be_read_is_damage(filled):
    path = filled.blobs.path(filled.get_version("b").blob_digest)
    path.unlink()
    path.mkdir()
    (damage,) = filled.verify()
    assert (damage.problem, damage.used_by) == ("unreadable", ("b@1",))


# ---- gc


def test_what_is_used_stays(filled):
    age_all(filled)
    report = filled.gc()
    assert report.blobs == 0
    assert filled.verify() == []


def test_orphans_go_when_they_are_old(filled):
    filled.delete_task("a")
    orphan = filled.blobs.put(b"never committed")
    age_all(filled)
    report = filled.gc()
    assert report.blobs == 3
    assert report.freed_bytes == len(b"never committed" + b"routing a" + b"routing a, better")
    assert orphan not in filled.blobs.digests()
    assert filled.verify() == []


def test_a_young_orphan_stays_unless_told(filled):
    orphan = filled.blobs.put(b"about to be committed")
    assert filled.gc().blobs == 0
    assert filled.gc(min_age_s=0).blobs == 1
    with pytest.raises(BlobMissing):
        filled.blobs.get(orphan)


def test_putting_an_old_orphan_again_makes_it_young(filled):
    orphan = filled.blobs.put(b"content")
    age(filled.blobs.path(orphan))
    filled.blobs.put(b"content")
    assert filled.gc().blobs == 0
    assert filled.blobs.get(orphan) == b"content"


def test_checkpoints_of_finished_jobs_go_and_others_stay(filled):
    waiting, _ = filled.create_job(task_id="b", method="mhr", request={})
    filled.save_checkpoint(waiting.id, b"kept")
    (finished,) = filled.list_jobs(status="succeeded").items
    # As after a crash between the job's end and the removal of its checkpoint.
    filled.save_checkpoint(finished.id, b"left")
    assert filled.gc().checkpoints == 1
    assert filled.load_checkpoint(finished.id) is None
    assert filled.load_checkpoint(waiting.id) == b"kept"


def test_temporary_files_of_dead_writers_go(filled, place):
    left = [place.data_dir / "blobs" / "tmp" / "dead.tmp", place.data_dir / "checkpoints" / "dead.tmp"]
    for path in left:
        path.write_bytes(b"12345")
        age(path)
    young = place.data_dir / "blobs" / "tmp" / "alive.tmp"
    young.write_bytes(b"1")
    report = filled.gc()
    assert report.temporary_files == 2
    assert [path.exists() for path in (*left, young)] == [False, False, True]


# ---- backup


def state(store):
    tasks = store.list_tasks().items
    job_records = store.list_jobs().items
    return {
        "inventories": store.list_inventories(),
        "tasks": tasks,
        "versions": [store.list_versions(task.id) for task in tasks],
        "jobs": job_records,
        "events": [store.list_events(job.id) for job in job_records],
        "blobs": {digest: store.blobs.get(digest) for digest in store.blobs.digests()},
    }


def test_a_backup_opens_as_a_data_directory_with_the_same_content(filled, tmp_path):
    report = filled.backup(tmp_path / "copy")
    assert (report.path, report.blobs, report.damaged) == (tmp_path / "copy", 4, ())
    assert report.size_bytes == 700 + 9 + 9 + 17
    with Store.open(tmp_path / "copy") as copy:
        assert state(copy) == state(filled)
        assert copy.verify() == []
        copy.create_job(task_id="b", method="mhr", request={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "data"]


def test_a_backup_leaves_orphans_behind(filled, tmp_path):
    orphan = filled.blobs.put(b"orphan")
    filled.backup(tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copy:
        assert orphan not in copy.blobs.digests()


def test_a_backup_copies_what_is_sound_and_names_the_rest(filled, tmp_path):
    filled.blobs.path(filled.get_version("b").blob_digest).unlink()
    report = filled.backup(tmp_path / "copy")
    assert [(damage.problem, damage.used_by) for damage in report.damaged] == [("missing", ("b@1",))]
    assert report.blobs == 3
    with Store.open(tmp_path / "copy") as copy:
        assert [damage.used_by for damage in copy.verify()] == [("b@1",)]


def test_a_backup_never_overwrites(filled, tmp_path):
    target = tmp_path / "copy"
    target.mkdir()
    filled.backup(target)
    with pytest.raises(Conflict, match="not an empty directory"):
        filled.backup(target)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(Conflict):
        filled.backup(file)
    assert file.read_text() == "mine"


def test_what_a_broken_off_backup_left_is_no_hindrance(filled, tmp_path):
    partial = tmp_path / "copy.partial"
    partial.mkdir()
    (partial / "catalog.sqlite3").write_bytes(b"torn")
    filled.backup(tmp_path / "copy")
    assert not partial.exists()


def test_a_backup_of_an_empty_store_is_an_empty_store(store, tmp_path):
    assert store.backup(tmp_path / "copy").blobs == 0
    with Store.open(tmp_path / "copy") as copy:
        assert copy.count_tasks() == 0
