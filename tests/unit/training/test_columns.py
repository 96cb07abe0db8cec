from __future__ import annotations

import pytest

from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.columns import read_columns, read_hyperparameters
from tests.support.tiny_server import random_inventory


@pytest.fixture
def inventories(backbone: Backbone) -> dict[str, Inventory]:
    return {"": random_inventory(backbone), "flat": random_inventory(backbone, num_heads=1)}


def test_a_column_is_a_method_and_where_need_be_its_inventory(inventories: dict[str, Inventory]) -> None:
    columns = read_columns(["base", "demos", "mu", "mhr-z", "poly-mu@flat", "lora"], inventories)
    assert [column.inventory for column in columns] == [None, None, "", "", "flat", None]
    assert [column.method for column in columns if column.learns] == ["mhr-z", "poly-mu", "lora"]
    assert [column.method for column in columns if not column.uses_examples] == ["base", "mu"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["soup"], "unknown method 'soup'; choose among base, demos, mu, mhr"),
        (["mu", "mu"], "named twice"),
        ([], "no methods"),
        (["lora@flat"], "'lora' uses no inventory"),
        (["base@flat"], "'base' uses no inventory"),
        (["poly@soup"], "--inventory soup=PATH"),
        (["poly"], "needs an inventory with h = 1.*use 'mhr'"),
        (["mhr@flat"], "'flat' has h = 1; use 'poly'"),
    ],
)
def test_what_cannot_be_compared_is_refused(inventories: dict[str, Inventory], names: list[str], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        read_columns(names, inventories)


def test_without_an_inventory_the_option_is_named() -> None:
    with pytest.raises(InvalidInput, match="'mu' needs an inventory; name it with --inventory PATH"):
        read_columns(["mu"], {})


def test_the_narrower_hyperparameters_win(inventories: dict[str, Inventory]) -> None:
    columns = read_columns(["mu", "mhr", "poly-mu@flat", "mhr-mu"], inventories)
    given = {"": {"steps": 5, "rank": 2}, "poly-mu": {"steps": 6}, "poly-mu@flat": {"steps": 7}, "mhr-mu": {"rank": 3}}
    resolved = read_hyperparameters(columns, given)
    assert {name: (h.steps, h.rank) for name, h in resolved.items()} == {
        "mhr": (5, 2),
        "poly-mu@flat": (7, 2),
        "mhr-mu": (5, 3),
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mhr": {"steps": 0}}, "hyperparameters of mhr: steps: "),
        ({"": {"momentum": 1}}, "hyperparameters of mhr: momentum: "),
        ({"mu": {"steps": 1}}, "for mu, which no method of this run learns with"),
        ({"lora": {"steps": 1}}, "for lora, which no method"),
    ],
)
def test_hyperparameters_without_effect_are_refused(
    inventories: dict[str, Inventory], given: dict[str, dict[str, object]], reason: str
) -> None:
    with pytest.raises(InvalidInput, match=reason):
        read_hyperparameters(read_columns(["mu", "mhr"], inventories), given)
