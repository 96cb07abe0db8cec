"""What an evaluation compares: a column is a method, where need be with the inventory that it starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.adapters.inventory import Inventory
from server.errors import InvalidInput
from server.training.methods import Hyperparameters, Method

BASE, DEMONSTRATIONS, MEAN = "base", "demos", "mu"
METHODS = (BASE, DEMONSTRATIONS, MEAN, *(method.value for method in Method))
UNNAMED = ""  # the inventory given without a name

_INVENTORY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Column:
    """One column of the comparison. `inventory` names an inventory of the run, None where there is none to need."""

    name: str
    method: str
    inventory: str | None

    @property
    def learns(self) -> bool:
        """Whether the method trains on the examples."""
        return self.method not in (BASE, DEMONSTRATIONS, MEAN)

    @property
    def uses_examples(self) -> bool:
        return self.method not in (BASE, MEAN)


def read_columns(names: Sequence[str], inventories: Mapping[str, Inventory]) -> tuple[Column, ...]:
    """Columns of the form METHOD or METHOD@NAME.

    Raises InvalidInput for an unknown method, an inventory that is missing or too many, one whose heads are
    not the method's, and a column named twice.
    """
    if not names:
        raise InvalidInput(f"no methods to compare; choose among {', '.join(METHODS)}", param="methods")
    if len(set(names)) < len(names):
        raise InvalidInput(f"a method is named twice in {', '.join(names)}; name each once", param="methods")
    return tuple(_read_column(name, inventories) for name in names)


def is_inventory_name(text: str) -> bool:
    """Whether a text can stand behind the @ of a column."""
    return _INVENTORY_NAME.fullmatch(text) is not None


def read_hyperparameters(
    columns: Sequence[Column], given: Mapping[str, Mapping[str, Any]]
) -> dict[str, Hyperparameters]:
    """{column: hyperparameters} of the columns that learn.

    `given` maps a column, a method, or "" for all, to what is set for it; the narrower wins. Raises InvalidInput
    for a name that is neither, and for values that /adapt would refuse.
    """
    learning = [column for column in columns if column.learns]
    unknown = given.keys() - {UNNAMED} - {c.name for c in learning} - {c.method for c in learning}
    if unknown:
        raise InvalidInput(
            f"hyperparameters are given for {', '.join(sorted(unknown))}, which no method of this run learns with",
            param="hyperparameters",
        )
    return {column.name: _merged(column, given) for column in learning}


def _read_column(name: str, inventories: Mapping[str, Inventory]) -> Column:
    method, at, inventory = name.partition("@")
    if method not in METHODS:
        raise InvalidInput(f"unknown method {method!r}; choose among {', '.join(METHODS)}", param="methods")
    if method in (BASE, DEMONSTRATIONS, Method.LORA):
        if at:
            raise InvalidInput(f"{method!r} uses no inventory; write it without @{inventory}", param="methods")
        return Column(name, method, None)
    if inventory not in inventories:
        wanted = f"--inventory {inventory}=PATH" if at else "--inventory PATH"
        raise InvalidInput(f"the method {name!r} needs an inventory; name it with {wanted}", param="methods")
    if method != MEAN:
        Method(method).check_heads(inventory or "the inventory", inventories[inventory].num_heads)
    return Column(name, method, inventory)


def _merged(column: Column, given: Mapping[str, Mapping[str, Any]]) -> Hyperparameters:
    values: dict[str, Any] = {}
    for key in dict.fromkeys((UNNAMED, column.method, column.name)):
        values |= given.get(key, {})
    try:
        hyperparameters = Hyperparameters.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidInput(
            f"hyperparameters of {column.name}: {field}: {first['msg']}", param="hyperparameters"
        ) from None
    hyperparameters.check(Method(column.method))
    return hyperparameters
