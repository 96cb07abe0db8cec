from __future__ import annotations

import hashlib
import os
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store import BlobDamaged, BlobMissing, StoreError
from adapters_store.blobs import BlobStore


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def test_a_blob_lies_under_its_digest(blobs, tmp_path):
    digest = blobs.put(b"content")
    assert digest == hashlib.sha256(b"content").hexdigest()
    assert blobs.path(digest) == tmp_path / "blobs" / "sha256" / digest[:2] / f"{digest}.safetensors"
    assert blobs.path(digest).read_bytes() == b"content"
    assert blobs.get(digest) == b"content"
    assert blobs.size(digest) == 7
    assert list(blobs.digests()) == [digest]


def test_no_temporary_file_is_left(blobs, tmp_path):
    blobs.put_many([b"%d" % number for number in range(40)])
    assert list((tmp_path / "blobs" / "tmp").iterdir()) == []


@settings(max_examples=20, deadline=None)
@given(contents=st.lists(st.binary(max_size=64), max_size=8))
def test_many_at_once_equal_one_by_one(tmp_path_factory, contents):
    root = tmp_path_factory.mktemp("blobs")
    one, many = BlobStore(root / "one"), BlobStore(root / "many")
    digests = many.put_many(contents)
    assert digests == [one.put(content) for content in contents]
    assert [many.get(digest) for digest in digests] == contents
    assert list(many.digests()) == list(one.digests())


def test_the_same_bytes_are_kept_once_and_untouched(blobs):
    digest = blobs.put(b"content")
    inode = blobs.path(digest).stat().st_ino
    assert blobs.put(b"content") == digest
    assert blobs.path(digest).stat().st_ino == inode


@pytest.mark.parametrize("harmed", [b"", b"conten", b"CONTENT", b"content and more"])
def test_damage_is_found_on_read_and_repaired_by_putting_again(blobs, harmed):
    digest = blobs.put(b"content")
    blobs.path(digest).write_bytes(harmed)
    with pytest.raises(BlobDamaged) as caught:
        blobs.get(digest)
    assert (caught.value.digest, caught.value.path) == (digest, blobs.path(digest))
    assert str(blobs.path(digest)) in str(caught.value)
    blobs.put(b"content")
    assert blobs.get(digest) == b"content"


def test_a_missing_blob_is_named(blobs):
    digest = "0" * 64
    for read in (blobs.get, blobs.size):
        with pytest.raises(BlobMissing, match=str(blobs.path(digest))):
            read(digest)


@pytest.mark.parametrize("digest", ["", "../../secret", "0" * 63, "g" * 64, "A" * 64, "0" * 63 + "/"])
def test_what_is_no_digest_reaches_no_file(blobs, digest):
    with pytest.raises(StoreError, match="not a blob digest"):
        blobs.get(digest)


def test_bytes_and_name_are_durable_in_the_right_order(blobs, monkeypatch):
    """The bytes before the name, the name before `put` returns."""
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        steps.append("sync directory" if os.path.isdir(target) else "sync file")
        real_fsync(descriptor)

    def replace(source, target):
        steps.append("rename")
        real_replace(source, target)

    blobs.put(b"so that the directories exist")
    blobs.path(hashlib.sha256(b"content").hexdigest()).parent.mkdir(exist_ok=True)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    blobs.put(b"content")
    assert steps == ["sync file", "rename", "sync directory"]


def test_a_full_disk_is_a_store_error_and_leaves_nothing(blobs, tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        blobs.put_many([b"a", b"b"])
    monkeypatch.undo()
    assert list(blobs.digests()) == []
    assert list((tmp_path / "blobs" / "tmp").iterdir()) == []


def test_the_collector_never_takes_a_blob_that_is_put_meanwhile(blobs):
    """Putters and the collector race on one old orphan: what a `put` returned must be there afterwards."""
    content = b"contended"
    digest = blobs.put(content)
    stop = threading.Event()
    lost = []

    def put_and_look():
        while not stop.is_set():
            blobs.put(content)
            # Younger than a minute now, so the collector lets it be.
            time.sleep(random.uniform(0, 0.001))
            try:
                blobs.get(digest)
            except BlobMissing as error:
                lost.append(error)
            then = time.time() - 120
            os.utime(blobs.path(digest), (then, then))
            # Now the collector may take it, before or while it is put again.
            time.sleep(random.uniform(0, 0.001))

    putter = threading.Thread(target=put_and_look)
    putter.start()
    removed, deadline = 0, time.monotonic() + 30
    while removed < 50 and time.monotonic() < deadline:
        removed += blobs.remove_if_older(digest, 60) is not None
    stop.set()
    putter.join()
    assert lost == []
    assert removed == 50


def test_removing_what_is_gone_already_is_no_error(blobs):
    digest = blobs.put(b"content")
    assert blobs.remove_if_older(digest, 0) == 7
    assert blobs.remove_if_older(digest, 0) is None
