"""Python client of MHR Server: `Client` and `AsyncClient`.

from mhr_client import Client

with Client() as mhr:
    print(mhr.generate("task1217_atomic_answer_generation", "PersonX takes the bus home.").text)
"""

from __future__ import annotations

from mhr_client.async_client import AsyncClient, AsyncJob
from mhr_client.client import Client, Job
from mhr_client.errors import (
    AdapterUnavailable,
    APIError,
    AuthenticationError,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidRequest,
    JobFailed,
    MHRClientError,
    NotFound,
    ProtocolError,
    RateLimited,
    ServerError,
    TooLarge,
    Unavailable,
    WaitTimeout,
)
from mhr_client.transport import RetryPolicy
from mhr_client.types import (
    Backbone,
    Generation,
    Info,
    Inventory,
    JobEvent,
    JobInfo,
    Logprob,
    Output,
    Page,
    Score,
    Task,
    Timing,
    Token,
    TokenLogprob,
    Usage,
    Version,
)

__all__ = [
    "APIError",
    "AdapterUnavailable",
    "AsyncClient",
    "AsyncJob",
    "AuthenticationError",
    "Backbone",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "Generation",
    "Info",
    "InvalidRequest",
    "Inventory",
    "Job",
    "JobEvent",
    "JobFailed",
    "JobInfo",
    "Logprob",
    "MHRClientError",
    "NotFound",
    "Output",
    "Page",
    "ProtocolError",
    "RateLimited",
    "RetryPolicy",
    "Score",
    "ServerError",
    "Task",
    "Timing",
    "Token",
    "TokenLogprob",
    "TooLarge",
    "Unavailable",
    "Usage",
    "Version",
    "WaitTimeout",
]
