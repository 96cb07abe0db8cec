"""A task as a PEFT LoRA checkpoint in a tar archive."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

from server.adapters.peft_format import lora_files, uses_conv1d
from server.backbone import Backbone
from server.errors import InvalidInput
from server.tasks import TaskCatalog


@dataclass(frozen=True)
class Archive:
    """A tar archive of one directory, `name`."""

    name: str
    content: bytes


class TaskExporter:
    """Writes served tasks in PEFT's format."""

    def __init__(self, catalog: TaskCatalog, backbone: Backbone, source: str) -> None:
        self._catalog = catalog
        self._base_model = source
        self._fan_in_fan_out = uses_conv1d(backbone.model)

    def files(self, reference: str) -> tuple[str, dict[str, bytes]]:
        """(directory name, {file name: content}) of `task`, `task@version` or `mu`.

        Raises NotFound, AdapterUnavailable, and InvalidInput for `base`, which has no adapter.
        """
        task = self._catalog.resolve(reference)
        try:
            if task.pinned is None:
                raise InvalidInput("base has no adapter to export; name a task or `mu`", param="task_id")
            name = task.task_id if task.version is None else f"{task.task_id}-v{task.version}"
            adapter = task.pinned.adapter
            return name, lora_files(adapter, base_model=self._base_model, fan_in_fan_out=self._fan_in_fan_out)
        finally:
            task.release()

    def export(self, reference: str) -> Archive:
        """The checkpoint as a tar archive. Raises what `files` raises."""
        name, files = self.files(reference)
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for file, content in files.items():
                entry = tarfile.TarInfo(f"{name}/{file}")
                entry.size = len(content)
                entry.mode = 0o644
                tar.addfile(entry, io.BytesIO(content))
        return Archive(name, buffer.getvalue())
