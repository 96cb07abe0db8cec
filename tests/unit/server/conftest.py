"""A tiny backbone and a store with an inventory over it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from adapters_store.store import Store
from server.adapters.cache import AdapterCache
from server.adapters.injection import linear_sizes
from server.backbone import Backbone, load_backbone
from server.inventories import import_inventory
from server.logs import configure_logging
from server.tasks import TaskCatalog
from tests.support.tiny_server import random_inventory, write_tiny_model


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the developer's own shell have no part in these tests."""
    for name in [name for name in os.environ if name.startswith("MHR_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _own_logs() -> Iterator[None]:
    """Errors alone, and nothing of it after the test: its streams are closed then."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure_logging("error")
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_model), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def catalog(store: Store, backbone: Backbone) -> TaskCatalog:
    """The inventory `tiny` with its tasks `capital` and `rhyme`."""
    sizes = linear_sizes(backbone.model)
    import_inventory(store, "tiny", random_inventory(backbone).to_bytes(), backbone, sizes)
    return TaskCatalog(store, AdapterCache(1 << 20), backbone, sizes)
