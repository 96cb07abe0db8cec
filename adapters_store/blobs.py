"""Blobs: immutable bytes on disk, named by their own digest and checked on every read.

A blob that exists is shared by everyone who puts the same bytes. `put` and the collector of orphans meet
under a file lock: a blob that was just put is young, and the collector leaves young blobs alone, so the
row that will name it can be committed in peace.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from adapters_store.errors import BlobDamaged, BlobMissing, StoreError
from adapters_store.files import make_directories, remove_temporary, sync_directory, write_aside

SUFFIX = ".safetensors"
# The kernel joins concurrent fsyncs into one journal commit: 16 threads wrote 400 blobs of 30 kB 15 times as fast.
_WRITERS = 16


def digest_of(data: bytes) -> str:
    """The name of these bytes: sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class BlobStore:
    """Blobs under `root`: `sha256/ab/<digest>.safetensors`."""

    def __init__(self, root: Path) -> None:
        self._sha256 = root / "sha256"
        self._temporary = root / "tmp"
        self._lock_path = root / "lock"
        make_directories([self._sha256, self._temporary])

    def path(self, digest: str) -> Path:
        """Where the blob lies or would lie. Raises StoreError for what is no digest."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise StoreError(f"{digest!r} is not a blob digest (64 hexadecimal digits).")
        return self._sha256 / digest[:2] / f"{digest}{SUFFIX}"

    def put(self, data: bytes) -> str:
        """Make the bytes durable and return their digest. A damaged blob of that name is repaired."""
        return self.put_many([data])[0]

    def put_many(self, blobs: Sequence[bytes]) -> list[str]:
        """Make all the bytes durable and return their digests in order. Raises StoreError when that fails."""
        digests = [digest_of(data) for data in blobs]
        try:
            self._write(digests, blobs)
        except OSError as error:
            raise StoreError(
                f"blobs cannot be written: {error}. Free space, or make the directory writable."
            ) from error
        return digests

    def get(self, digest: str) -> bytes:
        """The blob's bytes. Raises BlobMissing, or BlobDamaged when they do not have that digest."""
        path = self.path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobMissing(digest, path) from None
        except OSError as error:
            raise BlobDamaged(digest, path, f"it cannot be read ({error.strerror})") from error
        if digest_of(data) != digest:
            raise BlobDamaged(digest, path)
        return data

    def size(self, digest: str) -> int:
        """The blob's size in bytes. Raises BlobMissing."""
        path = self.path(digest)
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise BlobMissing(digest, path) from None

    def digests(self) -> Iterator[str]:
        """The digests of all blobs on disk, in order."""
        for path in sorted(self._sha256.glob(f"[0-9a-f][0-9a-f]/*{SUFFIX}")):
            yield path.stem

    def remove_if_older(self, digest: str, min_age_s: float) -> int | None:
        """Remove the blob when nobody put it for `min_age_s` seconds; returns the bytes freed, None if it stays."""
        path = self.path(digest)
        with self._locked(fcntl.LOCK_EX):
            try:
                status = path.stat()
            except FileNotFoundError:
                return None
            if time.time() - status.st_mtime < min_age_s:
                return None
            path.unlink()
        return status.st_size

    def remove_temporary(self, min_age_s: float) -> list[int]:
        """Remove what writers that died left behind; returns the sizes of the files removed."""
        return remove_temporary(self._temporary, min_age_s)

    def _write(self, digests: Sequence[str], blobs: Sequence[bytes]) -> None:
        unique = dict(zip(digests, blobs, strict=True))
        directories = sorted({self.path(digest).parent for digest in unique})
        make_directories(directories)
        if len(unique) == 1:
            self._write_absent(digests[0], blobs[0])
        else:
            with ThreadPoolExecutor(_WRITERS, thread_name_prefix="blob-writer") as pool:
                list(pool.map(self._write_absent, unique.keys(), unique.values()))
        for directory in directories:
            sync_directory(directory)

    def _write_absent(self, digest: str, data: bytes) -> None:
        path = self.path(digest)
        with self._locked(fcntl.LOCK_SH):
            if self._holds(path, data):
                os.utime(path)
                return
        aside = write_aside(self._temporary, data)
        with self._locked(fcntl.LOCK_SH):
            os.replace(aside, path)

    def _holds(self, path: Path, data: bytes) -> bool:
        try:
            return path.stat().st_size == len(data) and path.read_bytes() == data
        except FileNotFoundError:
            return False

    @contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, mode)
            yield
        finally:
            os.close(descriptor)
