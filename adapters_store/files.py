"""Files that are whole or absent: written aside, made durable, then renamed into place."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def write_aside(directory: Path, data: bytes) -> Path:
    """Write `data` durably to a new temporary file in `directory` and return its path."""
    path = directory / f"{secrets.token_hex(16)}{TEMPORARY_SUFFIX}"
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def replace_durably(path: Path, data: bytes, temporary: Path) -> None:
    """Make `path` hold `data`, atomically and durably; `temporary` is a directory on the same file system."""
    os.replace(write_aside(temporary, data), path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(directories: Iterable[Path]) -> None:
    """Create the directories and their parents where absent, durably."""
    absent = {path for directory in directories for path in (directory, *directory.parents) if not path.is_dir()}
    for path in sorted(absent):
        path.mkdir(exist_ok=True)
    for parent in {path.parent for path in absent}:
        sync_directory(parent)


def remove_temporary(directory: Path, min_age_s: float) -> list[int]:
    """Remove temporary files that nobody wrote to for `min_age_s` seconds; returns their sizes."""
    freed = []
    for path in directory.glob(f"*{TEMPORARY_SUFFIX}"):
        # A writer that is still alive may rename its file at any moment.
        with suppress(FileNotFoundError):
            status = path.stat()
            if time.time() - status.st_mtime >= min_age_s:
                path.unlink()
                freed.append(status.st_size)
    return freed
