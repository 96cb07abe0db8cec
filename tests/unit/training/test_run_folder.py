from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.run_folder import RunFolder, read_log


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.begin_log()
    return folder


def test_the_last_two_checkpoints_are_kept(folder: RunFolder) -> None:
    assert folder.checkpoint is None
    for data in (b"one", b"two", b"three"):
        folder.write_checkpoint(data)
    assert folder.checkpoint is not None
    assert folder.checkpoint.read_bytes() == b"three"
    folder.checkpoint.unlink()
    assert folder.checkpoint.read_bytes() == b"two"


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_file(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_checkpoint(b"one")
    folder.write_checkpoint(b"two")
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder.path / "log.jsonl").unlink()
    del before["log.jsonl"]
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        folder.write_checkpoint(b"three")
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_while_a_checkpoint_is_put_in_place_leaves_a_newest_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    folder.write_checkpoint(b"one")
    renames = iter(range(1, 9))
    rename = os.replace

    def killed(source: Path, target: Path) -> None:
        if next(renames) == killed_at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.write_checkpoint(b"two")
    assert folder.checkpoint is not None
    assert folder.checkpoint.read_bytes() == b"one"


def test_the_log_is_cut_to_what_is_not_done_again(folder: RunFolder) -> None:
    kept = [{"step": 0, "validation": {"a": 1.0}}, {"step": 1, "loss": 2.0}, {"step": 2, "alignment": 0.5}]
    for record in [*kept, {"step": 2, "validation": {"a": 0.5}}, {"step": 3, "loss": 1.0}]:
        folder.log(record)
    with (folder.path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # as a kill in the middle of a write would leave it
    folder.cut_log(2)
    assert read_log(folder.path) == kept


@pytest.mark.parametrize("text", [None, "nonsense\n", "3\n"])
def test_a_log_that_is_missing_or_damaged_is_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InvalidInput, match=r"cannot read the run's log .*log\.jsonl"):
        read_log(tmp_path)
