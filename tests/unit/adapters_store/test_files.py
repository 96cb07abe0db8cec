from __future__ import annotations

import os

import pytest

from adapters_store.files import make_directories, remove_temporary, replace_durably, write_aside


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    replace_durably(path, b"one", tmp_path)
    replace_durably(path, b"two", tmp_path)
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(_descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_aside(tmp_path, b"data")
    assert list(tmp_path.iterdir()) == []


def test_directories_are_made_with_their_parents_and_may_exist(tmp_path):
    wanted = [tmp_path / "a" / "b", tmp_path / "a" / "c", tmp_path]
    make_directories(wanted)
    make_directories(wanted)
    assert all(directory.is_dir() for directory in wanted)


def test_every_new_directory_is_made_durable_in_its_parent(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    make_directories([tmp_path / "a" / "b", tmp_path / "a" / "c"])
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a")]


def test_only_old_temporary_files_are_removed(tmp_path):
    old, young, other = tmp_path / "old.tmp", tmp_path / "young.tmp", tmp_path / "old.txt"
    for path in (old, young, other):
        path.write_bytes(b"123")
    for path in (old, other):
        os.utime(path, (0, 0))
    assert remove_temporary(tmp_path, 3600) == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.txt", "young.tmp"]
