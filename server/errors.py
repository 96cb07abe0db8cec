"""Every error that a user can meet, with its HTTP status on the class.

MHRError                    500 server_error
├── InvalidInput            422 invalid_request      the request or file cannot be used as it is
├── Unauthorized            401 authentication       no key, or an unknown one
├── NotFound                404 not_found            no such task, version, job or inventory
├── Conflict                409 conflict             the state forbids it
│   └── BackboneMismatch    409 backbone_mismatch    an inventory of another backbone
├── TooLarge                413 too_large            longer than a limit
├── AdapterUnavailable      424 adapter_unavailable  the task's adapter cannot be assembled
├── RateLimited             429 rate_limited         a key's limit
├── Unavailable             503 unavailable          queue full, or draining; try again later
└── DeadlineExceeded        504 deadline_exceeded    the request's time ran out
"""

from __future__ import annotations


class MHRError(Exception):
    """An error with a remedy for the caller.

    `message` says what is wrong and what to do; `param` names the field or argument at fault;
    `code` is a short machine-readable reason, by default the error's type.
    """

    status = 500
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.type


class InvalidInput(MHRError):
    """The request, file or setting cannot be used as it is."""

    status = 422
    type = "invalid_request"


class Unauthorized(MHRError):
    """No API key was sent, or it is unknown."""

    status = 401
    type = "authentication"


class NotFound(MHRError):
    """No task, version, job or inventory has that name."""

    status = 404
    type = "not_found"


class Conflict(MHRError):
    """The present state forbids the operation."""

    status = 409
    type = "conflict"


class BackboneMismatch(Conflict):
    """An inventory or adapter was made for another backbone."""

    type = "backbone_mismatch"


class TooLarge(MHRError):
    """Something is longer than a limit."""

    status = 413
    type = "too_large"


class AdapterUnavailable(MHRError):
    """The adapter of a known task cannot be assembled, e.g. because its blob is damaged."""

    status = 424
    type = "adapter_unavailable"


class RateLimited(MHRError):
    """A key asked more often than it may."""

    status = 429
    type = "rate_limited"


class Unavailable(MHRError):
    """The server cannot take the request now; `retry_after_s` says when to try again."""

    status = 503
    type = "unavailable"

    def __init__(self, message: str, *, retry_after_s: int = 1, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(MHRError):
    """The request was not finished within its time."""

    status = 504
    type = "deadline_exceeded"
