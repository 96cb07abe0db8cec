"""/healthz, /readyz, /metrics and /info."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Depends, Response

from server import __version__
from server.api import views
from server.api.deps import RuntimeDep, require_key
from server.api.docs import ERRORS
from server.metrics import CONTENT_TYPE
from server.runtime import Phase

router = APIRouter(tags=["server"])


@router.get(
    "/healthz",
    response_model=views.Health,
    responses={503: {"model": views.Health, "description": "Only a restart helps; `reason` says why"}},
)
async def healthz(runtime: RuntimeDep, response: Response) -> views.Health:
    """200 while the process is worth keeping, be it ready or not."""
    if runtime.phase is Phase.FAILED:
        response.status_code = 503
        return views.Health(status=runtime.phase.value, reason=runtime.reason)
    return views.Health(status="ok")


@router.get(
    "/readyz",
    response_model=views.Health,
    responses={503: {"model": views.Health, "description": "Warming or draining; `reason` says which"}},
)
async def readyz(runtime: RuntimeDep, response: Response) -> views.Health:
    """200 when the server takes work, else 503 with the reason."""
    if runtime.phase is not Phase.READY:
        response.status_code = 503
        response.headers["Retry-After"] = "1"
    return views.Health(status=runtime.phase.value, reason=runtime.reason)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
    },
)
async def metrics(runtime: RuntimeDep) -> Response:
    """Metrics of this process and of the jobs in the catalog."""
    return Response(await asyncio.to_thread(runtime.scrape), media_type=CONTENT_TYPE)


@router.get("/info", response_model=views.Info, responses=ERRORS, dependencies=[Depends(require_key)])
def info(runtime: RuntimeDep) -> views.Info:
    """What runs here: version, backbone, served inventory and settings, without secrets."""
    services = runtime.services_if_warm()
    served = None if services is None else services.catalog.served_inventory()
    backbone = None if services is None else services.backbone
    return views.Info(
        version=__version__,
        status=runtime.phase.value,
        backbone=None
        if backbone is None
        else views.BackboneView(
            name=backbone.name,
            fingerprint=backbone.fingerprint,
            context_length=backbone.context_length,
            device=str(backbone.device),
            dtype=str(backbone.dtype).removeprefix("torch."),
        ),
        inventory=None if served is None else served.name,
        tasks=runtime.store.count_tasks(),
        settings=runtime.settings.public(),
    )
