"""The folder of a pre-training run: its checkpoints, its log, and what it made. Survives a kill at any instant."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from server.errors import InvalidInput

CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
INVENTORY = "inventory.safetensors"
CARD = "card.md"
LOG = "log.jsonl"


class RunFolder:
    """Files are written whole: to a temporary file, to the disk, then renamed. Raises OSError as the disk does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint's file. The one before it stands while a new one is being put in its place."""
        return next((p for p in (self.path / CHECKPOINT, self.path / PREVIOUS) if p.exists()), None)

    def write_checkpoint(self, data: bytes) -> None:
        """Keep a state, and the one before it. What was logged so far is on the disk by then."""
        if (self.path / LOG).exists():
            with (self.path / LOG).open("rb") as log:
                os.fsync(log.fileno())
        written = self._write_aside(CHECKPOINT, data)
        if (self.path / CHECKPOINT).exists():
            os.replace(self.path / CHECKPOINT, self.path / PREVIOUS)
        self._put(written, CHECKPOINT)

    def write(self, name: str, data: bytes) -> Path:
        """Write or replace a file."""
        self._put(self._write_aside(name, data), name)
        return self.path / name

    def begin_log(self) -> None:
        """Start with an empty log."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write(LOG, b"")

    def log(self, record: dict[str, Any]) -> None:
        """Add a record to the log."""
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop what is to be done again: all that was logged after a step, and the validation at its end."""
        kept = [r for r in read_log(self.path) if r["step"] <= step and not ("validation" in r and r["step"] > 0)]
        self.write(LOG, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def _write_aside(self, name: str, data: bytes) -> Path:
        aside = self.path / f"{name}.writing"
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            aside.unlink(missing_ok=True)  # a half-written file would only keep a full disk full
            raise
        return aside

    def _put(self, written: Path, name: str) -> None:
        os.replace(written, self.path / name)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log, in order; a last line that a kill cut short is left out.

    {"step", "loss", "seconds"} of every step, {"step", "validation": {task: loss}} before and after, and
    {"step", "alignment"} where it was measured. Raises InvalidInput, naming the file, when it is missing or
    holds something else.
    """
    path = folder / LOG
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"cannot read the run's log {path}: {error}") from error
