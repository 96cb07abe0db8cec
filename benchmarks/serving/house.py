"""Everything that a run of the benchmark holds: its folder, inventory and prompts, and what it has started."""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from server.backbone import load_backbone
from serving.data import make_inventory, prepare
from serving.process import ServerProcess, start_ours
from serving.waves import RunWave, Target
from serving.workload import Prompt, PromptMaker


class House:
    """A context manager: all servers end and the folder goes when it is left."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="mhr-bench-"))
        self._stack = ExitStack()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._opened: dict[Target, RunWave] = {}
        backbone = load_backbone(options.backbone, options.cache_dir)
        self.inventory = make_inventory(options, backbone)
        self._prompts = PromptMaker(backbone.tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def open(self, target: Target) -> RunWave:
        """The target, started when first asked for."""
        if target not in self._opened:
            self._opened[target] = target.open(self)
        return self._opened[target]

    def ending(self, end: Callable[[], object]) -> None:
        """Call `end` when the house is left."""
        self._stack.callback(end)

    def prompts(self, count: int, tokens: int | None = None) -> list[Prompt]:
        """Texts of exactly so many tokens, each different from all before."""
        return self._prompts.make(count, tokens or self.options.prompt_tokens)

    def data_dir(self, tasks: int) -> Path:
        """A new data directory with so many registered tasks."""
        folder = Path(tempfile.mkdtemp(prefix=f"data-{tasks}-", dir=self.folder)) / "data"
        prepare(folder, self.options.cache_dir, self.inventory, tasks)
        return folder

    def start_ours(self, tasks: int, settings: Mapping[str, str]) -> ServerProcess:
        """A server of ours with so many tasks, ended with the house."""
        return self.serve(self.data_dir(tasks), settings)

    def serve(self, data_dir: Path, settings: Mapping[str, str]) -> ServerProcess:
        """A server of ours on a data directory, ended with the house."""
        chosen = {"MHR_BACKBONE": self.options.backbone, "MHR_INVENTORY": "benchmark", "MHR_WORKER": "false"}
        process = start_ours(data_dir, chosen | dict(settings), self.folder / f"{data_dir.parent.name}.log")
        self.ending(process.stop)
        return process

    @cached_property
    def model_folder(self) -> Path:
        """Where the backbone's files lie, for peers."""
        given = Path(self.options.backbone)
        return given if given.is_dir() else self.options.cache_dir / "backbones" / self.options.backbone

    @property
    def adapter_bytes(self) -> int:
        """The size of one assembled adapter."""
        sizes = self.inventory.linear_sizes.values()
        return 4 * self.inventory.rank * sum(d_in + d_out for d_in, d_out in sizes)

    @property
    def settings(self) -> dict[str, Any]:
        """The options as plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items()}
