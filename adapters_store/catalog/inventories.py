"""Inventories in the catalog."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters_store.errors import NotFound
from adapters_store.models import InventoryRow
from adapters_store.values import INVENTORY_NAME


def find_inventory(session: Session, name: str) -> InventoryRow | None:
    return session.get(InventoryRow, name) if INVENTORY_NAME.fullmatch(name) else None


def get_inventory(session: Session, name: str) -> InventoryRow:
    """Raises NotFound."""
    row = find_inventory(session, name)
    if row is None:
        raise NotFound(f"there is no inventory {name!r}; `mhr inventory list` shows those there are.")
    return row


def list_inventories(session: Session) -> Sequence[InventoryRow]:
    """All inventories by name."""
    return session.scalars(select(InventoryRow).order_by(InventoryRow.name)).all()
