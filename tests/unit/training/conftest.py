from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.adapters.inventory import Inventory
from server.backbone import Backbone, load_backbone
from server.training.examples import Example
from tests.support.tiny_server import random_inventory, write_tiny_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def backbone(tiny_folder: Path, cache_dir: Path) -> Backbone:
    """A random Llama of bytes, fp32."""
    return load_backbone(str(tiny_folder), cache_dir)


@pytest.fixture
def inventory(backbone: Backbone) -> Inventory:
    """Random skills with h = 4, K = 3."""
    return random_inventory(backbone)


@pytest.fixture
def examples() -> list[Example]:
    """Twelve examples whose answer is always the same letter: learnable in a few steps."""
    return [Example(f"number {i}", ("x",)) for i in range(12)]


WriteTask = Callable[..., Path]


@pytest.fixture
def write_task(tmp_path: Path) -> WriteTask:
    """Writes a task in the schema of Super-NaturalInstructions and returns its folder."""

    def write(name: str, instances: list[dict[str, object]], definition: str = "Answer.") -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        document = {
            "Definition": [definition],
            "Instances": instances,
            "Instance License": ["MIT"],
            "Source": ["made up"],
        }
        (folder / f"{name}.json").write_text(json.dumps(document))
        return folder

    return write
