from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.errors import InvalidValue
from adapters_store.store import Store
from server.adapters.assembly import Adapter, mean_adapter
from server.adapters.cache import AdapterCache
from server.adapters.injection import linear_sizes
from server.adapters.peft_format import write_lora
from server.backbone import Backbone
from server.errors import AdapterUnavailable, InvalidInput
from server.importing import check_inventory, import_paths
from server.inventories import Imported, import_inventory
from server.settings import Settings
from server.tasks import TaskCatalog
from tests.support.tiny_server import random_inventory

Import = Callable[..., Imported]


@pytest.fixture
def settings(store: Store, tiny_model: Path, tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", backbone=str(tiny_model))


@pytest.fixture
def import_(store: Store, settings: Settings) -> Import:
    def run(*paths: Path, name: str = "imported", task_names: list[str] | None = None) -> Imported:
        return import_paths(store, settings, paths, name, task_names)

    return run


@pytest.fixture
def loras(backbone: Backbone, tmp_path: Path) -> dict[str, tuple[Path, Adapter]]:
    """Two PEFT LoRA directories and their adapters."""
    found = {}
    for seed, name in enumerate(("tagger", "rewriter")):
        adapter = mean_adapter(random_inventory(backbone, seed=seed))
        write_lora(adapter, tmp_path / name, base_model="tiny")
        found[name] = (tmp_path / name, adapter)
    return found


def test_loras_become_tasks_that_are_exactly_themselves(
    import_: Import, loras: dict[str, tuple[Path, Adapter]], store: Store, backbone: Backbone
) -> None:
    imported = import_(*(path for path, _ in loras.values()))
    assert imported.tasks == ("tagger", "rewriter")
    assert (imported.record.num_skills, imported.record.num_heads) == (2, 1)
    catalog = TaskCatalog(store, AdapterCache(1 << 20), backbone, linear_sizes(backbone.model))
    for name, (_, adapter) in loras.items():
        served = catalog.resolve(name).handle
        assert served is not None
        for linear, pair in served.adapter.weights.items():
            assert pair.A.equal(adapter.weights[linear].A)
            assert pair.B.equal(adapter.weights[linear].B)
    assert check_inventory(store, "imported") == ["tagger", "rewriter"]


def test_loras_may_be_given_other_names(import_: Import, loras: dict[str, tuple[Path, Adapter]]) -> None:
    paths = [path for path, _ in loras.values()]
    assert import_(*paths, task_names=["a", "b"]).tasks == ("a", "b")
    for names in (["a"], ["a", "a"]):
        with pytest.raises(InvalidInput, match="2 LoRA directories need as many different task names"):
            import_(*paths, name="again", task_names=names)


def test_what_cannot_be_imported_together_is_refused(
    import_: Import, loras: dict[str, tuple[Path, Adapter]], backbone: Backbone, tmp_path: Path
) -> None:
    file = tmp_path / "inventory.safetensors"
    file.write_bytes(random_inventory(backbone).to_bytes())
    lora = loras["tagger"][0]
    with pytest.raises(InvalidInput, match="give one inventory file"):
        import_(file, lora)
    with pytest.raises(InvalidInput, match="names its own tasks"):
        import_(file, task_names=["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match="no PEFT checkpoint directory"):
        import_(tmp_path / "empty")
    with pytest.raises(InvalidValue, match="'Bad Name'"):
        import_(lora, task_names=["Bad Name"])


def test_a_reserved_task_name_is_refused(import_: Import, loras: dict[str, tuple[Path, Adapter]], store: Store) -> None:
    with pytest.raises(InvalidInput, match="'mu' is reserved"):
        import_(loras["tagger"][0], task_names=["mu"])
    assert store.list_inventories() == []


def test_an_inventory_whose_weights_are_not_finite_is_named(
    store: Store, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    inventory = random_inventory(backbone)
    next(iter(inventory.B.values()))[...] = float("nan")
    monkeypatch.setattr("server.inventories.check_sizes", lambda *_: None)
    import_inventory(store, "odd", inventory.to_bytes(), backbone, linear_sizes(backbone.model))
    with pytest.raises(AdapterUnavailable, match="'capital' of 'odd'"):
        check_inventory(store, "odd")
