from __future__ import annotations

from pathlib import Path

import pytest

from adapters_store.errors import Conflict
from adapters_store.store import Store
from server.adapters.injection import linear_sizes
from server.backbone import Backbone, load_backbone
from server.errors import BackboneMismatch, InvalidInput
from server.inventories import BUNDLED_FOLDER, bundled_names, import_bundled, import_inventory
from tests.support.tiny_server import TASKS, random_inventory, write_tiny_model


@pytest.fixture
def sizes(backbone: Backbone) -> dict[str, tuple[int, int]]:
    return linear_sizes(backbone.model)


def test_an_inventory_comes_with_its_tasks(store: Store, backbone: Backbone, sizes: dict[str, tuple[int, int]]) -> None:
    data = random_inventory(backbone).to_bytes()
    imported = import_inventory(store, "tiny", data, backbone, sizes)
    assert imported.tasks == TASKS
    assert (imported.record.num_heads, imported.record.num_skills, imported.record.rank) == (4, 3, 2)
    assert imported.record.metadata["prompt_format"] == "definition-input-output"
    task = store.get_task("capital")
    assert (task.instruction, task.served_version, task.metadata) == ("Do capital.", 1, {"licence": "MIT"})
    assert store.get_version("capital").size_bytes < 60_000
    assert import_inventory(store, "tiny", data, backbone, sizes).record == imported.record


def test_another_backbones_inventory_is_refused_with_both_fingerprints(
    store: Store, backbone: Backbone, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path, seed=7)
    other = load_backbone(str(tmp_path), tmp_path / "cache")
    with pytest.raises(BackboneMismatch) as caught:
        import_inventory(store, "foreign", random_inventory(other).to_bytes(), backbone, sizes)
    assert backbone.fingerprint in caught.value.message
    assert other.fingerprint in caught.value.message
    assert store.list_inventories() == []


def test_what_is_no_inventory_is_refused(store: Store, backbone: Backbone, sizes: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(InvalidInput, match="mhr-inventory-1"):
        import_inventory(store, "junk", b"junk", backbone, sizes)


def test_a_taken_task_id_imports_nothing(store: Store, backbone: Backbone, sizes: dict[str, tuple[int, int]]) -> None:
    store.put_task("rhyme", instruction="mine", defaults={}, inventory=None, metadata={})
    with pytest.raises(Conflict, match="rhyme"):
        import_inventory(store, "tiny", random_inventory(backbone).to_bytes(), backbone, sizes)
    assert store.list_inventories() == []
    assert store.count_tasks() == 1


def test_bundled_inventories_that_fit_are_imported_once(
    store: Store, backbone: Backbone, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    folder = tmp_path / "bundled"
    folder.mkdir()
    (folder / "fits.safetensors").write_bytes(random_inventory(backbone).to_bytes())
    write_tiny_model(tmp_path / "other", seed=7)
    other = load_backbone(str(tmp_path / "other"), tmp_path / "cache")
    (folder / "other.safetensors").write_bytes(random_inventory(other).to_bytes())
    store.put_task("rhyme", instruction="mine", defaults={}, inventory=None, metadata={})
    for _ in range(2):
        import_bundled(store, backbone, sizes, folder)
        assert [record.name for record in store.list_inventories()] == ["fits"]
        assert store.get_task("rhyme").instruction == "mine"
        assert store.get_task("capital").served_version == 1


def test_the_bundled_folder_is_the_checkouts() -> None:
    assert Path(__file__).resolve().parents[3] / "inventories" == BUNDLED_FOLDER
    assert bundled_names(Path("no such folder")) == []
