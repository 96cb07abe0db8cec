"""One server per data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from adapters_store.errors import DataDirInUse
from adapters_store.files import make_directories


class DataDirLock:
    """An exclusive lock on a data directory, held by the kernel: it ends with the process that holds it."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._descriptor: int | None = None

    @property
    def path(self) -> Path:
        """The lock file; it holds the pid of the last holder and is never removed."""
        return self._data_dir / "server.lock"

    def acquire(self) -> None:
        """Take the lock, creating the data directory where absent. Raises DataDirInUse when it is held."""
        if self._descriptor is not None:
            return
        make_directories([self._data_dir])
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read_pid(descriptor)
            os.close(descriptor)
            raise DataDirInUse(self._data_dir, pid) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> DataDirLock:
        self.acquire()
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
