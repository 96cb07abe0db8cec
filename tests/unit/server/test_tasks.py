from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from adapters_store.store import Store
from server.adapters.assembly import assemble, mean_adapter
from server.adapters.blobs import adapter_to_bytes
from server.adapters.cache import AdapterCache
from server.adapters.injection import linear_sizes
from server.backbone import Backbone, load_backbone
from server.errors import AdapterUnavailable, BackboneMismatch, Conflict, InvalidInput, NotFound
from server.inventories import import_inventory
from server.tasks import TaskCatalog, check_not_reserved, parse_reference
from server.training.prompts import DEFAULT_PROMPT_FORMAT
from tests.support.tiny_server import random_inventory, write_tiny_model


@pytest.mark.parametrize(
    ("reference", "parsed"), [("a", ("a", None)), ("a.b-c_9@12", ("a.b-c_9", 12)), ("9", ("9", None))]
)
def test_references(reference: str, parsed: tuple[str, int | None]) -> None:
    assert parse_reference(reference) == parsed


@pytest.mark.parametrize("reference", ["", "A", "-a", "a@", "a@0", "a@-1", "a@x", "a@1@2", "a b", "a" * 129, "a\n"])
def test_what_no_task_can_be_called_is_not_found(reference: str) -> None:
    with pytest.raises(NotFound):
        parse_reference(reference)


@pytest.mark.parametrize("task_id", ["base", "mu"])
def test_reserved_ids_are_refused(task_id: str) -> None:
    with pytest.raises(InvalidInput, match="reserved"):
        check_not_reserved(task_id)


def test_base_has_no_adapter(catalog: TaskCatalog) -> None:
    task = catalog.resolve("base")
    assert (task.handle, task.version, task.instruction) == (None, None, "")


def test_a_routing_is_assembled_from_its_inventory(catalog: TaskCatalog, backbone: Backbone) -> None:
    inventory = random_inventory(backbone)
    task = catalog.resolve("capital")
    assert (task.version, task.instruction, task.prompt_format) == (1, "Do capital.", DEFAULT_PROMPT_FORMAT)
    assert task.handle is not None
    expected = assemble(inventory, inventory.routings["capital"])
    for linear, pair in task.handle.adapter.weights.items():
        torch.testing.assert_close(pair.A, expected.weights[linear].A, rtol=2e-2, atol=2e-3)  # stored in fp16
    task.release()


def test_the_mean_of_a_task_and_mu_are_the_same_adapter(catalog: TaskCatalog, backbone: Backbone) -> None:
    catalog.register("mine", instruction="i", defaults={}, metadata={}, inventory=None, routing=None)
    mine, mu = catalog.resolve("mine"), catalog.resolve("mu")
    assert mine.handle is not None
    assert mu.handle is not None
    assert mine.handle.key == mu.handle.key  # one slot serves both
    expected = mean_adapter(random_inventory(backbone))
    for linear, pair in mu.handle.adapter.weights.items():
        torch.testing.assert_close(pair.B, expected.weights[linear].B, rtol=2e-2, atol=2e-3)


def test_a_resolved_task_keeps_its_version_when_another_is_promoted(catalog: TaskCatalog, store: Store) -> None:
    before = catalog.resolve("capital")
    store.register_task("capital", instruction="new", defaults={}, inventory="tiny", metadata={}, kind="mu", blob=None)
    after = catalog.resolve("capital")
    assert (before.version, before.instruction, after.version, after.instruction) == (1, "Do capital.", 2, "new")
    assert catalog.resolve("capital@1").handle == before.handle


def test_many_threads_assemble_a_task_once(store: Store, backbone: Backbone) -> None:
    sizes = linear_sizes(backbone.model)
    import_inventory(store, "tiny", random_inventory(backbone).to_bytes(), backbone, sizes)
    assembled: list[str] = []
    catalog = TaskCatalog(
        store, AdapterCache(1 << 20), backbone, sizes, on_assembly=lambda kind, seconds: assembled.append(kind)
    )
    threads = [threading.Thread(target=lambda: catalog.resolve("rhyme").release()) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assembled == ["routing"]


def test_an_adapter_of_its_own_is_served(catalog: TaskCatalog, store: Store, backbone: Backbone) -> None:
    adapter = mean_adapter(random_inventory(backbone, seed=5))
    blob = adapter_to_bytes(adapter, backbone.fingerprint)
    store.register_task("own", instruction="", defaults={}, inventory=None, metadata={}, kind="adapter", blob=blob)
    task = catalog.resolve("own")
    assert task.handle is not None
    assert task.handle.adapter.alpha == adapter.alpha
    assert task.prompt_format == DEFAULT_PROMPT_FORMAT


def test_an_adapter_of_another_backbone_is_unavailable(catalog: TaskCatalog, store: Store, backbone: Backbone) -> None:
    blob = adapter_to_bytes(mean_adapter(random_inventory(backbone)), "f" * 64)
    store.register_task("foreign", instruction="", defaults={}, inventory=None, metadata={}, kind="adapter", blob=blob)
    with pytest.raises(AdapterUnavailable, match="f" * 64):
        catalog.resolve("foreign")


def test_a_blob_that_is_no_adapter_is_unavailable(catalog: TaskCatalog, store: Store) -> None:
    store.register_task("odd", instruction="", defaults={}, inventory=None, metadata={}, kind="adapter", blob=b"odd")
    with pytest.raises(AdapterUnavailable, match="odd@1"):
        catalog.resolve("odd")


def test_tasks_of_another_backbone_are_unavailable_and_say_why(
    catalog: TaskCatalog, store: Store, backbone: Backbone, tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "other", seed=9)
    other = load_backbone(str(tmp_path / "other"), tmp_path)
    elsewhere = TaskCatalog(store, AdapterCache(1 << 20), other, linear_sizes(other.model))
    with pytest.raises(AdapterUnavailable) as caught:
        elsewhere.resolve("capital")
    assert backbone.fingerprint in caught.value.message
    assert other.fingerprint in caught.value.message
    assert elsewhere.served_inventory() is None
    with pytest.raises(BackboneMismatch):
        elsewhere.pick_inventory("tiny")


def test_unknown_tasks_and_versions_are_not_found(catalog: TaskCatalog) -> None:
    for reference in ("nobody", "capital@7", "nobody@1"):
        with pytest.raises(NotFound):
            catalog.resolve(reference)


def test_a_task_without_a_served_version_is_a_conflict(catalog: TaskCatalog, store: Store) -> None:
    store.put_task("bare", instruction="", defaults={}, inventory=None, metadata={})
    with pytest.raises(Conflict, match="POST /tasks/bare/promote"):
        catalog.resolve("bare")


def test_a_damaged_inventory_is_unavailable(catalog: TaskCatalog, store: Store) -> None:
    path = store.blobs.path(store.get_inventory("tiny").digest)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterUnavailable, match="capital@1"):
        catalog.resolve("capital")


def test_the_preferred_inventory_is_served_else_the_only_fitting_one(
    catalog: TaskCatalog, store: Store, backbone: Backbone
) -> None:
    served = catalog.served_inventory()
    assert served is not None
    assert served.name == "tiny"
    sizes = linear_sizes(backbone.model)
    second = random_inventory(backbone, seed=3)
    import_inventory(store, "second", second.to_bytes(), backbone, sizes, skip_tasks=list(second.routings))
    assert catalog.served_inventory() is None  # two fit, none is preferred
    with pytest.raises(InvalidInput, match="name one"):
        catalog.pick_inventory(None)
    choosy = TaskCatalog(
        store, AdapterCache(0), backbone, sizes, preferred_inventories=["missing", "second"]
    ).served_inventory()
    assert choosy is not None
    assert choosy.name == "second"


def test_registering_the_same_content_again_makes_no_version(catalog: TaskCatalog, store: Store) -> None:
    def register(instruction: str) -> bool:
        _, created = catalog.register(
            "r", instruction=instruction, defaults={}, metadata={}, inventory="tiny", routing=None
        )
        return created

    assert [register("a"), register("a"), register("b")] == [True, False, False]
    assert [version.number for version in store.list_versions("r")] == [1]
    assert store.get_task("r").instruction == "b"


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_routing_that_cannot_be_stored_is_refused(catalog: TaskCatalog, backbone: Backbone, value: float) -> None:
    linears, heads, skills = random_inventory(backbone).routing_shape
    routing = [[[value] * skills] * heads] * linears
    with pytest.raises(InvalidInput, match="logit"):
        catalog.register("r", instruction="", defaults={}, metadata={}, inventory=None, routing=routing)
