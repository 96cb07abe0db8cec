from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters_store.errors import DataDirInUse
from server.errors import BackboneMismatch, InvalidInput, NotFound, Unavailable
from server.runtime import Phase, Runtime
from server.settings import Settings
from tests.support.tiny_server import import_tiny, write_tiny_model


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", backbone=str(tiny_model), worker=False, threads=1)


def test_a_life(settings: Settings) -> None:
    runtime = Runtime.open(settings)
    with pytest.raises(Unavailable, match="not ready: starting"):
        runtime.services()
    runtime.warm()
    assert runtime.phase is Phase.READY
    assert runtime.services() is runtime.accepting()
    runtime.close()
    runtime.close()
    Runtime.open(settings).close()  # everything was given back


def test_a_second_server_on_the_same_directory_is_refused(settings: Settings) -> None:
    runtime = Runtime.open(settings)
    try:
        with pytest.raises(DataDirInUse, match="is in use by process"):
            Runtime.open(settings)
    finally:
        runtime.close()


def test_a_bad_key_file_is_refused_before_anything_is_opened(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="MHR_API_KEYS_FILE"):
        Runtime.open(settings.model_copy(update={"api_keys_file": tmp_path / "none"}))
    Runtime.open(settings).close()


@pytest.mark.parametrize(
    ("change", "error"),
    [({"backbone": "/no/such/model"}, InvalidInput), ({"inventory": "none-such"}, NotFound)],
)
def test_what_cannot_be_loaded_fails_with_its_reason(
    settings: Settings, change: dict[str, str], error: type[Exception]
) -> None:
    runtime = Runtime.open(settings.model_copy(update=change))
    try:
        with pytest.raises(error):
            runtime.warm()
        assert runtime.phase is Phase.FAILED
        assert runtime.failure is not None
        assert next(iter(change.values())) in str(runtime.reason)
        with pytest.raises(Unavailable):
            runtime.services()
    finally:
        runtime.close()


def test_an_inventory_of_another_backbone_cannot_be_the_served_one(settings: Settings, tmp_path: Path) -> None:
    runtime = Runtime.open(settings)
    import_tiny(runtime)
    runtime.close()
    write_tiny_model(tmp_path / "other", seed=3)
    other = settings.model_copy(update={"backbone": str(tmp_path / "other"), "inventory": "tiny"})
    runtime = Runtime.open(other)
    try:
        with pytest.raises(BackboneMismatch):
            runtime.warm()
    finally:
        runtime.close()


async def test_draining_refuses_new_work_and_leaves_reading(settings: Settings) -> None:
    runtime = Runtime.open(settings)
    try:
        await asyncio.to_thread(runtime.warm)
        await runtime.drain()
        with pytest.raises(Unavailable, match="stopping"):
            runtime.accepting()
        runtime.services()
    finally:
        runtime.close()
