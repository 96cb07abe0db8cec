"""Checkpoints of running jobs: one file a job, replaced atomically, gone with the job."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from adapters_store.errors import InvalidValue
from adapters_store.files import make_directories, remove_temporary, replace_durably
from adapters_store.values import JOB_ID

_SUFFIX = ".ckpt"
_DIGEST_BYTES = 32


class CheckpointFiles:
    """Files `<job>.ckpt` under `root`: the sha256 of the payload, then the payload."""

    def __init__(self, root: Path) -> None:
        self._root = root
        make_directories([root])

    def save(self, job_id: str, data: bytes) -> None:
        """Replace the job's checkpoint; a crash leaves the old one or the new one."""
        replace_durably(self._path(job_id), hashlib.sha256(data).digest() + data, self._root)

    def load(self, job_id: str) -> bytes | None:
        """The job's checkpoint, or None: there is none, or it is damaged, and the job starts over."""
        try:
            content = self._path(job_id).read_bytes()
        except FileNotFoundError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return data if hashlib.sha256(data).digest() == digest else None

    def delete(self, job_id: str) -> int:
        """Remove the job's checkpoint if there is one; returns the bytes freed."""
        path = self._path(job_id)
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return size

    def job_ids(self) -> Iterator[str]:
        """The jobs that have a checkpoint."""
        for path in sorted(self._root.glob(f"job-*{_SUFFIX}")):
            yield path.stem

    def remove_temporary(self, min_age_s: float) -> list[int]:
        """Remove what writers that died left behind; returns the sizes of the files removed."""
        return remove_temporary(self._root, min_age_s)

    def _path(self, job_id: str) -> Path:
        if JOB_ID.fullmatch(job_id) is None:
            raise InvalidValue("job_id", f"{job_id!r} is not a job id.")
        return self._root / f"{job_id}{_SUFFIX}"
