from __future__ import annotations

import os

import pytest

from adapters_store import DataDirInUse, DataDirLock


def test_a_second_holder_is_told_who_holds_it_and_what_to_do(tmp_path):
    with DataDirLock(tmp_path), pytest.raises(DataDirInUse) as caught:
        DataDirLock(tmp_path).acquire()
    assert caught.value.pid == os.getpid()
    assert f"{tmp_path} is in use by process {os.getpid()}. Stop that server first" in str(caught.value)


def test_a_released_lock_can_be_taken_again(tmp_path):
    first, second = DataDirLock(tmp_path), DataDirLock(tmp_path)
    first.acquire()
    first.acquire()
    first.release()
    first.release()
    second.acquire()
    with pytest.raises(DataDirInUse):
        first.acquire()
    second.release()


def test_the_data_directory_is_made(tmp_path):
    lock = DataDirLock(tmp_path / "new" / "data")
    with lock:
        assert lock.path.read_text() == f"{os.getpid()}\n"


def test_a_holder_without_a_readable_pid_is_another_process(tmp_path):
    with DataDirLock(tmp_path) as held:
        held.path.write_text("")
        with pytest.raises(DataDirInUse, match="another process") as caught:
            DataDirLock(tmp_path).acquire()
    assert caught.value.pid is None
