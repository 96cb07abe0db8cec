"""Taking an adaptation in: everything that can be known to be wrong is refused before a job exists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters_store.errors import NotFound as StoreNotFound
from adapters_store.records import InventoryRecord, JobRecord
from adapters_store.store import Store
from server.backbone import Backbone
from server.errors import InvalidInput
from server.tasks import TaskCatalog, check_not_reserved
from server.training.batches import encode_examples
from server.training.examples import Example
from server.training.methods import Hyperparameters, Method


class AdaptationService:
    """Checks adaptation requests and queues them in the store, where the worker finds them."""

    def __init__(self, store: Store, catalog: TaskCatalog, backbone: Backbone, *, max_examples: int) -> None:
        self._store = store
        self._catalog = catalog
        self._backbone = backbone
        self._max_examples = max_examples

    def submit(self, request: Mapping[str, Any], idempotency_key: str | None = None) -> tuple[JobRecord, bool]:
        """Queue a job for a request as `AdaptRequest` dumps it; returns it, and whether it is new.

        `hyperparameters` holds only those that the caller set.

        Raises InvalidInput naming the field, NotFound for an unknown inventory, BackboneMismatch, and Conflict
        when the idempotency key was used for another request.
        """
        task_id, method = request["task_id"], Method(request["method"])
        check_not_reserved(task_id)
        self._check_number(request)
        _check_hyperparameters(method, request["hyperparameters"])
        inventory = self._pick_inventory(method, request["inventory"])
        instruction = self._instruction(task_id, request["instruction"])
        self._check_lengths(request, instruction, inventory)
        job = dict(request) | {"inventory": None if inventory is None else inventory.name, "instruction": instruction}
        return self._store.create_job(
            task_id=task_id, method=method.value, request=job, idempotency_key=idempotency_key
        )

    def _check_number(self, request: Mapping[str, Any]) -> None:
        total = len(request["examples"]) + len(_held_out(request))
        if total > self._max_examples:
            row = self._max_examples
            where = "examples" if row < len(request["examples"]) else "validation.examples"
            raise InvalidInput(
                f"there are {total} examples; at most {self._max_examples} are taken (MHR_MAX_EXAMPLES). Send fewer",
                param=f"{where}[{row if where == 'examples' else row - len(request['examples'])}]",
                code="too_many_examples",
            )

    def _check_lengths(self, request: Mapping[str, Any], instruction: str, inventory: InventoryRecord | None) -> None:
        """Refuse, naming the row, an example that does not fit the backbone's context."""
        for place, rows in (("examples", request["examples"]), ("validation.examples", _held_out(request))):
            encode_examples(
                self._backbone.tokenizer,
                [Example(row["input"], tuple(row["output"])) for row in rows],
                task=0,
                instruction=instruction,
                prompt_format=self._catalog.prompt_format(inventory),
                context_length=self._backbone.context_length,
                place=place,
            )

    def _pick_inventory(self, method: Method, name: str | None) -> InventoryRecord | None:
        if not method.needs_inventory:
            if name is not None:
                raise InvalidInput(f"method {method} uses no inventory; leave inventory out", param="inventory")
            return None
        record = self._catalog.pick_inventory(name)
        method.check_heads(record.name, record.num_heads)
        return record

    def _instruction(self, task_id: str, given: str | None) -> str:
        if given is not None:
            return given
        try:
            return self._store.get_task(task_id).instruction
        except StoreNotFound:
            return ""


def _held_out(request: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (request["validation"] or {}).get("examples") or ()


def _check_hyperparameters(method: Method, given: Mapping[str, Any]) -> None:
    """Raise InvalidInput for one that the method cannot learn with, or that has no effect with it."""
    hyperparameters = Hyperparameters(**given)
    hyperparameters.check(method)
    for name in sorted(hyperparameters.idle_in(method) & set(given)):
        raise InvalidInput(
            f"{name} has no effect with method {method}; remove it",
            param=f"hyperparameters.{name}",
            code="no_effect",
        )
