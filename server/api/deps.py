"""What handlers need: the running server's parts, and the caller's key."""

from __future__ import annotations

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.errors import Unauthorized
from server.runtime import Runtime, Services

_bearer = HTTPBearer(auto_error=False, description="Needed when the server has MHR_API_KEYS_FILE")


def get_runtime(request: Request) -> Runtime:
    """The runtime of this app."""
    runtime: Runtime = request.app.state.runtime
    return runtime


def get_services(request: Request) -> Services:
    """The warm server's parts. Raises Unavailable while warming; draining leaves reads open."""
    return get_runtime(request).services()


def get_accepting(request: Request) -> Services:
    """Like `get_services`, for calls that start new work: also Unavailable while draining."""
    return get_runtime(request).accepting()


def require_key(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)] = None
) -> None:
    """Raise Unauthorized unless the caller's key is known, or the server has no keys."""
    keys = get_runtime(request).api_keys
    if not keys:
        return
    if credentials is None:
        raise Unauthorized("no API key was sent; send the header Authorization: Bearer <key>", code="missing_key")
    sent = credentials.credentials.encode()
    for key, name in keys.items():
        if hmac.compare_digest(key.encode(), sent):
            request.state.key_name = name
            return
    raise Unauthorized("the API key is unknown; ask the server's operator for one", code="unknown_key")


RuntimeDep = Annotated[Runtime, Depends(get_runtime)]
ServicesDep = Annotated[Services, Depends(get_services)]
AcceptingDep = Annotated[Services, Depends(get_accepting)]
