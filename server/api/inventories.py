"""/inventories."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from adapters_store.records import InventoryRecord
from server.api import views
from server.api.deps import ServicesDep, require_key
from server.api.docs import ERRORS
from server.runtime import Services

router = APIRouter(tags=["inventories"], dependencies=[Depends(require_key)])


@router.get("/inventories", response_model=views.InventoryPage, responses=ERRORS)
def list_inventories(services: ServicesDep) -> views.InventoryPage:
    """All inventories, ordered by name."""
    served = services.catalog.served_inventory()
    data = [_view(record, served, services) for record in services.store.list_inventories()]
    return views.InventoryPage(data=data)


@router.get("/inventories/{name}", response_model=views.InventoryDetail, responses=ERRORS)
def get_inventory(name: str, services: ServicesDep) -> views.InventoryDetail:
    """One inventory with its linears and the tasks it was trained on."""
    record = services.store.get_inventory(name)
    inventory = services.catalog.read_inventory(record)
    return views.InventoryDetail(
        **vars(_view(record, services.catalog.served_inventory(), services)),
        linears={linear: list(size) for linear, size in inventory.linear_sizes.items()},
        tasks=list(inventory.routings),
    )


def _view(record: InventoryRecord, served: InventoryRecord | None, services: Services) -> views.InventoryView:
    return views.InventoryView(
        **vars(record),
        served=served is not None and served.name == record.name,
        fits=services.catalog.fits(record),
    )
