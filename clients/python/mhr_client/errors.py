"""Everything the client raises.

MHRClientError
├── ConnectionFailed        the server could not be reached, or the connection broke
├── ProtocolError           the answer is not what this client understands
├── JobFailed               a job that was waited for failed or was cancelled
├── WaitTimeout             a job was still unfinished when the wait's time ran out
└── APIError                the server refused: status, type, message, param, code
    ├── InvalidRequest      400, 422
    ├── AuthenticationError 401, 403
    ├── NotFound            404
    ├── Conflict            409
    ├── TooLarge            413
    ├── AdapterUnavailable  424
    ├── RateLimited         429
    ├── Unavailable         503
    ├── DeadlineExceeded    504
    └── ServerError         any other
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mhr_client.types import JobInfo


class MHRClientError(Exception):
    """The base of every error of this package."""


class ConnectionFailed(MHRClientError):
    """The server could not be reached, or the connection broke before the answer was complete.

    `reached` tells whether the server may have received the request.
    """

    def __init__(self, message: str, *, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


class ProtocolError(MHRClientError):
    """The answer is not one that this client understands, e.g. because another program listens at the address."""


class JobFailed(MHRClientError):
    """A job ended as `failed` or `cancelled`; `job` has the details."""

    def __init__(self, job: JobInfo) -> None:
        super().__init__(f"{job.id} {job.status}: {job.error or 'no reason was given'}")
        self.job = job


class WaitTimeout(MHRClientError):
    """A job was still unfinished when the wait's time ran out; it goes on, and `job` is its last known state."""

    def __init__(self, job: JobInfo, timeout_s: float) -> None:
        super().__init__(f"{job.id} is still {job.status} after {timeout_s:g} s; the job itself goes on")
        self.job = job


class APIError(MHRClientError):
    """The server refused a request.

    `status` is the HTTP status (None for an error inside a stream, which began with 200), `type` and `code` are
    machine-readable reasons, `param` names the field at fault, `retry_after_s` says when to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s


class InvalidRequest(APIError):
    """400 or 422: the request cannot be used as it is."""


class AuthenticationError(APIError):
    """401 or 403: no API key was sent, or it is not accepted."""


class NotFound(APIError):
    """404: no such task, version, job or inventory."""


class Conflict(APIError):
    """409: the present state forbids the operation."""


class TooLarge(APIError):
    """413: something is longer than a limit."""


class AdapterUnavailable(APIError):
    """424: the adapter of a known task cannot be assembled."""


class RateLimited(APIError):
    """429: this key asked too often."""


class Unavailable(APIError):
    """503: the queue is full, or the server is warming up or draining."""


class DeadlineExceeded(APIError):
    """504: the request was not finished within the server's time."""


class ServerError(APIError):
    """Any other refusal, such as 500."""


ERRORS_BY_STATUS: dict[int, type[APIError]] = {
    400: InvalidRequest,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: InvalidRequest,
    424: AdapterUnavailable,
    429: RateLimited,
    503: Unavailable,
    504: DeadlineExceeded,
}

# The error inside a stream carries no status, only its type.
ERRORS_BY_TYPE: dict[str, type[APIError]] = {
    "invalid_request": InvalidRequest,
    "authentication": AuthenticationError,
    "not_found": NotFound,
    "conflict": Conflict,
    "backbone_mismatch": Conflict,
    "too_large": TooLarge,
    "adapter_unavailable": AdapterUnavailable,
    "rate_limited": RateLimited,
    "unavailable": Unavailable,
    "deadline_exceeded": DeadlineExceeded,
}
