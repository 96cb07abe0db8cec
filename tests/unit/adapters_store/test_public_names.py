from __future__ import annotations

import dataclasses
import inspect

import adapters_store
from adapters_store import Store, errors, records

METHODS = {
    "open": "data_dir database_url clock",
    "close": "self",
    "add_inventory": "self name data backbone_fingerprint num_skills num_heads rank alpha metadata tasks",
    "get_inventory": "self name",
    "list_inventories": "self",
    "put_task": "self task_id instruction defaults inventory metadata",
    "update_task": "self task_id instruction defaults metadata",
    "delete_task": "self task_id",
    "get_task": "self task_id",
    "list_tasks": "self limit cursor prefix",
    "count_tasks": "self",
    "register_task": "self task_id instruction defaults inventory metadata kind blob",
    "add_version": "self task_id kind inventory blob method job_id metrics promote instruction",
    "get_version": "self task_id number",
    "list_versions": "self task_id",
    "promote": "self task_id number",
    "create_job": "self task_id method request idempotency_key",
    "get_job": "self job_id",
    "list_jobs": "self limit cursor status task_id",
    "count_jobs_by_status": "self",
    "claim_job": "self worker_id lease_s",
    "heartbeat": "self job_id worker_id lease_s progress",
    "finish_job": "self job_id worker_id status version error metrics",
    "complete_job_with_version": (
        "self job_id worker_id kind inventory blob instruction defaults metadata promote metrics"
    ),
    "release_job": "self job_id worker_id",
    "request_cancel": "self job_id",
    "append_event": "self job_id type data",
    "list_events": "self job_id after",
    "save_checkpoint": "self job_id data",
    "load_checkpoint": "self job_id",
    "delete_checkpoint": "self job_id",
    "verify": "self",
    "gc": "self min_age_s",
    "backup": "self target",
}


def test_the_stores_methods_are_pinned():
    public = {name: member for name, member in inspect.getmembers(Store, callable) if not name.startswith("_")}
    assert {name: " ".join(inspect.signature(member).parameters) for name, member in public.items()} == METHODS


def test_every_error_is_a_store_error_and_is_exported():
    classes = [
        member for _, member in inspect.getmembers(errors, inspect.isclass) if member.__module__ == errors.__name__
    ]
    assert all(issubclass(member, errors.StoreError) for member in classes)
    assert {member.__name__ for member in classes} <= set(adapters_store.__all__)


def test_every_record_is_frozen_and_exported():
    classes = [member for _, member in inspect.getmembers(records, dataclasses.is_dataclass)]
    assert all(member.__dataclass_params__.frozen for member in classes)
    assert {member.__name__ for member in classes} <= set(adapters_store.__all__)
