from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import LeaseLost
from adapters_store.records import JobRecord
from adapters_store.store import Store
from server.adapters.blobs import adapter_from_bytes, routing_from_bytes
from server.adapters.cache import AdapterCache
from server.adapters.injection import linear_sizes
from server.backbone import Backbone
from server.inventories import import_inventory
from server.tasks import TaskCatalog
from server.training import worker as worker_module
from server.training.adapt import AdaptResult
from server.training.search import Stopped
from server.training.worker import MAX_ATTEMPTS, Lease, Worker, make_spec
from tests.support.tiny_server import random_inventory


@pytest.fixture
def store(tmp_path: Path, backbone: Backbone) -> Iterator[Store]:
    with Store.open(tmp_path / "data") as store:
        import_inventory(store, "tiny", random_inventory(backbone).to_bytes(), backbone, linear_sizes(backbone.model))
        yield store


@pytest.fixture
def catalog(store: Store, backbone: Backbone) -> TaskCatalog:
    return TaskCatalog(store, AdapterCache(0), backbone, linear_sizes(backbone.model))


class Stopping:
    """Stops the worker once no job is queued or running."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._event = threading.Event()

    def is_set(self) -> bool:
        counts = self._store.count_jobs_by_status()
        return self._event.is_set() or counts["queued"] + counts["running"] == 0

    def wait(self, timeout: float) -> None:
        self._event.wait(min(timeout, 0.01))

    def set(self) -> None:
        self._event.set()


def _request(**changes: Any) -> dict[str, Any]:
    request = {
        "task_id": "letters",
        "instruction": "Say it.",
        "examples": [{"input": f"number {i}", "output": ["x"]} for i in range(12)],
        "method": "mhr",
        "inventory": "tiny",
        "hyperparameters": {"steps": 10, "evaluate_every": 5, "adapter_lr": 1e-2},
        "validation": None,
        "promote": "if_better",
        "seed": 0,
        "metadata": {"owner": "a test"},
    }
    return request | changes


def _queue(store: Store, **changes: Any) -> JobRecord:
    request = _request(**changes)
    return store.create_job(task_id=request["task_id"], method=request["method"], request=request)[0]


def _run(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    Worker(store, lambda: (backbone, catalog), "worker-1").run(Stopping(store))  # type: ignore[arg-type]


def test_a_job_makes_a_served_version_of_a_new_task(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    job = _queue(store)
    _run(store, backbone, catalog)
    done = store.get_job(job.id)
    assert (done.status, done.version) == ("succeeded", 1)
    assert done.metrics["loss_after"] < done.metrics["loss_before"]
    assert done.progress["step"] == 10
    task, version = store.get_task("letters"), store.get_version("letters")
    assert (task.instruction, task.metadata, task.served_version) == ("Say it.", {"owner": "a test"}, 1)
    assert (version.kind, version.inventory, version.method, version.job_id) == ("adapter", "tiny", "mhr", job.id)
    assert version.blob_digest is not None
    assert adapter_from_bytes(store.blobs.get(version.blob_digest)).rank == 2 + 4  # the inventory's, and the LoRA's
    assert store.load_checkpoint(job.id) is None
    kinds = [event.type for event in store.list_events(job.id)]
    assert kinds.count("step") == 10
    assert "validation" in kinds


def test_a_z_method_stores_a_routing_alone(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    job = _queue(store, method="mhr-z", promote="always")
    _run(store, backbone, catalog)
    version = store.get_version("letters")
    assert version.kind == "routing"
    assert version.blob_digest is not None
    assert routing_from_bytes(store.blobs.get(version.blob_digest)).shape == (14, 4, 3)
    assert store.get_job(job.id).metrics["version_bytes"] == version.size_bytes


def test_what_is_not_better_is_kept_but_not_served(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    worse = {"examples": [{"input": "number 3", "output": ["q"]}, {"input": "number 4", "output": ["q"]}]}
    job = _queue(store, task_id="rhyme", validation=worse, hyperparameters={"steps": 4, "adapter_lr": 1e-5})
    again = _queue(store, task_id="rhyme", validation=worse, hyperparameters={"steps": 4}, promote="never")
    _run(store, backbone, catalog)
    assert store.get_job(job.id).status == store.get_job(again.id).status == "succeeded"
    metrics = store.get_job(job.id).metrics
    after = (metrics["accuracy_after"], -metrics["loss_after"])
    promoted = after > (metrics["accuracy_before"], -metrics["loss_before"])
    assert store.get_task("rhyme").served_version == (2 if promoted else 1)
    assert [version.number for version in store.list_versions("rhyme")] == [1, 2, 3]


def test_the_same_examples_cannot_say_what_is_better(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    first, again = _queue(store), _queue(store, seed=1)
    _run(store, backbone, catalog)
    assert store.get_job(first.id).metrics["refit"]
    metrics = store.get_job(again.id).metrics
    assert (metrics["compared_examples"], metrics["accuracy_before"], metrics["promoted"]) == (0, None, False)
    assert store.get_task("letters").served_version == 1


def test_versions_are_compared_on_what_the_served_one_has_not_seen(
    store: Store, backbone: Backbone, catalog: TaskCatalog
) -> None:
    once = {"steps": 2, "adapter_lr": 1e-5, "refit": 0}
    _queue(store, promote="always", hyperparameters=once)
    same = _queue(store)
    fresh = [{"input": f"letter {i}", "output": ["x"]} for i in range(4)]
    more = _queue(store, examples=[*_request()["examples"], *fresh], validation={"fraction": 0.5}, promote="never")
    _run(store, backbone, catalog)
    # Without a refit the served version never saw what was held out: with the same seed, those of the second job.
    metrics = store.get_job(same.id).metrics
    assert (metrics["compared_examples"], metrics["promoted"]) == (metrics["validation_examples"], True)
    # The second version learnt from all of its examples; of the third job's, the fresh ones alone are new to it.
    request = store.get_job(more.id).request
    held_out = make_spec(request, "definition-input-output").validation
    new = [example for example in held_out if example.input.startswith("letter")]
    assert 0 < len(new) < len(held_out) == 8
    assert store.get_job(more.id).metrics["compared_examples"] == len(new)


def test_a_job_that_cannot_be_done_fails_with_its_reason(
    store: Store, backbone: Backbone, catalog: TaskCatalog
) -> None:
    job = _queue(store, inventory="gone")
    _run(store, backbone, catalog)
    failed = store.get_job(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "'gone'" in failed.error


def test_an_unforeseen_error_fails_the_job_and_not_the_worker(
    store: Store, backbone: Backbone, catalog: TaskCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> AdaptResult:
        raise RuntimeError("out of memory")

    broken = _queue(store)
    monkeypatch.setattr(worker_module, "adapt", burst)
    _run(store, backbone, catalog)
    monkeypatch.undo()
    assert store.get_job(broken.id).error == "RuntimeError: out of memory"
    fine = _queue(store)
    _run(store, backbone, catalog)
    assert store.get_job(fine.id).status == "succeeded"


def test_a_cancelled_job_ends_cancelled(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    job = _queue(store, hyperparameters={"steps": 5000, "patience": 5000})

    def cancel() -> None:
        while not any(event.type == "step" for event in store.list_events(job.id)):
            time.sleep(0.01)
        store.request_cancel(job.id)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    _run(store, backbone, catalog)
    canceller.join()
    assert store.get_job(job.id).status == "cancelled"


def test_a_stopping_worker_gives_the_job_back_and_the_next_goes_on(
    store: Store, backbone: Backbone, catalog: TaskCatalog
) -> None:
    job = _queue(store, hyperparameters={"steps": 60, "evaluate_every": 5, "patience": 100, "adapter_lr": 1e-3})
    stopping = Stopping(store)

    def stop() -> None:
        while sum(event.type == "step" for event in store.list_events(job.id)) < 7:
            time.sleep(0.01)
        stopping.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    Worker(store, lambda: (backbone, catalog), "worker-1").run(stopping)  # type: ignore[arg-type]
    stopper.join()
    assert store.get_job(job.id).status == "queued"
    assert store.load_checkpoint(job.id) is not None
    _run(store, backbone, catalog)
    assert store.get_job(job.id).status == "succeeded"
    (resumed,) = [event for event in store.list_events(job.id) if event.type == "from_checkpoint"]
    steps = [event.data["step"] for event in store.list_events(job.id) if event.type == "step"]
    assert resumed.data["step"] >= 7
    assert steps == list(range(1, 61))


def test_a_job_is_given_back_though_its_state_cannot_be_written(
    store: Store, backbone: Backbone, catalog: TaskCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _queue(store)
    stopping = Stopping(store)

    def fail(job_id: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def stop_with_the_last_state_unwritten(*request: object) -> None:
        lease = request[4]
        assert isinstance(lease, Lease)
        lease.save(b"a state")
        stopping.set()
        raise Stopped

    monkeypatch.setattr(store, "save_checkpoint", fail)
    monkeypatch.setattr(worker_module, "adapt", stop_with_the_last_state_unwritten)
    Worker(store, lambda: (backbone, catalog), "worker-1").run(stopping)  # type: ignore[arg-type]
    assert store.get_job(job.id).status == "queued"


def test_a_job_that_kills_its_workers_is_given_up(store: Store, backbone: Backbone, catalog: TaskCatalog) -> None:
    job = _queue(store)
    for _ in range(MAX_ATTEMPTS):
        assert store.claim_job("worker-that-dies", lease_s=0.0) is not None
    _run(store, backbone, catalog)
    failed = store.get_job(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert "died 3 times" in failed.error


def test_a_lease_taken_by_another_worker_stops_the_training(store: Store) -> None:
    _queue(store)
    claimed = store.claim_job("worker-1", lease_s=0.0)
    assert claimed is not None
    assert store.claim_job("worker-2", lease_s=60.0) is not None
    with Lease(store, claimed, "worker-1", 0.04, threading.Event()) as lease:
        with pytest.raises(LeaseLost):
            lease.renew()
        time.sleep(0.1)  # the background renewal notices too
        with pytest.raises(LeaseLost):
            lease.should_stop()


def test_a_checkpoint_is_written_while_the_job_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _queue(store)
    claimed = store.claim_job("worker-1", lease_s=60.0)
    assert claimed is not None
    save, may_write = store.save_checkpoint, threading.Event()

    def save_slowly(job_id: str, data: bytes) -> None:
        assert may_write.wait(30)
        save(job_id, data)

    monkeypatch.setattr(store, "save_checkpoint", save_slowly)
    with Lease(store, claimed, "worker-1", 60.0, threading.Event()) as lease:
        lease.save(b"a state")
        assert store.load_checkpoint(claimed.id) is None
        may_write.set()
        lease.finish_saving()
        assert store.load_checkpoint(claimed.id) == b"a state"
        lease.save(b"another")
    assert store.load_checkpoint(claimed.id) == b"another"


def test_a_checkpoint_that_cannot_be_written_fails_the_job(
    store: Store, backbone: Backbone, catalog: TaskCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job_id: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_checkpoint", fail)
    job = _queue(store, hyperparameters={"steps": 10, "evaluate_every": 2, "patience": 100})
    _run(store, backbone, catalog)
    failed = store.get_job(job.id)
    assert failed.status == "failed"
    assert "No space left on device" in (failed.error or "")


def test_a_spec_holds_out_what_the_request_says() -> None:
    spec = make_spec(_request(validation={"fraction": 0.5}), "definition-input-output")
    assert (len(spec.examples), len(spec.validation), spec.drawn) == (6, 6, True)
    given = make_spec(_request(validation={"examples": [{"input": "a", "output": ["b"]}]}), "definition-input-output")
    assert (len(given.examples), len(given.validation), given.drawn) == (12, 1, False)
