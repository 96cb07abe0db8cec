"""Every route as a function from arguments to a `Call`. No I/O: both clients only send what stands here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mhr_client.decoding import decode, page_parser, parser
from mhr_client.errors import ProtocolError
from mhr_client.transport import Call, ServerEvent, error_from_event
from mhr_client.types import (
    AdaptOptions,
    Example,
    Generation,
    Info,
    Inventory,
    JobEvent,
    JobInfo,
    JobStatus,
    Page,
    Parameters,
    Task,
    TaskChange,
    TaskOptions,
    Token,
)


def generate(
    task_id: str, inputs: str | Sequence[str], raw_prompt: bool, stream: bool, parameters: Parameters
) -> Call[Generation]:
    body: dict[str, Any] = {"task_id": task_id, "inputs": inputs if isinstance(inputs, str) else list(inputs)}
    if parameters:
        body["parameters"] = dict(parameters)
    if raw_prompt:
        body["raw_prompt"] = True
    if not stream:
        return Call("POST", "/generate", parser(Generation), body=body)
    return Call(
        "POST",
        "/generate",
        parser(Generation),
        body=body | {"stream": True},
        headers={"Accept": "text/event-stream"},
    )


def stream_item(event: ServerEvent) -> Token | Generation | None:
    """What a stream's event means; None for an event that this client does not know.

    Raises the server's error where the event is one.
    """
    if event.name == "token":
        return decode(Token, event.data)
    if event.name == "done":
        return decode(Generation, event.data)
    if event.name == "error":
        raise error_from_event(event.data)
    return None


def stream_ended_early() -> ProtocolError:
    return ProtocolError("the stream ended before the answer was complete; the server may have been stopped")


def adapt(task_id: str, examples: Iterable[Example], options: AdaptOptions) -> Call[JobInfo]:
    body: dict[str, Any] = {"task_id": task_id, "examples": [_example(example) for example in examples]}
    body |= {name: value for name, value in options.items() if name != "idempotency_key"}
    headers = {"Idempotency-Key": options["idempotency_key"]} if "idempotency_key" in options else {}
    return Call("POST", "/adapt", parser(JobInfo), body=body, headers=headers)


def _example(example: Example) -> dict[str, Any]:
    if isinstance(example, Mapping):
        return dict(example)
    text, output = example
    return {"input": text, "output": output if isinstance(output, str) else list(output)}


def get_job(job_id: str) -> Call[JobInfo]:
    return Call("GET", f"/jobs/{_part(job_id)}", parser(JobInfo))


def list_jobs(
    limit: int | None, cursor: str | None, status: JobStatus | None, task_id: str | None
) -> Call[Page[JobInfo]]:
    params = _given(limit=limit, cursor=cursor, status=status, task_id=task_id)
    return Call("GET", "/jobs", page_parser(JobInfo), params=params)


def job_events(job_id: str, after: int) -> Call[Page[JobEvent]]:
    return Call("GET", f"/jobs/{_part(job_id)}/events", page_parser(JobEvent), params={"after": after})


def cancel_job(job_id: str) -> Call[JobInfo]:
    return Call("POST", f"/jobs/{_part(job_id)}/cancel", parser(JobInfo))


def list_tasks(limit: int | None, cursor: str | None, prefix: str | None) -> Call[Page[Task]]:
    return Call("GET", "/tasks", page_parser(Task), params=_given(limit=limit, cursor=cursor, prefix=prefix))


def get_task(task_id: str) -> Call[Task]:
    return Call("GET", f"/tasks/{_part(task_id)}", parser(Task))


def put_task(task_id: str, options: TaskOptions) -> Call[Task]:
    return Call("PUT", f"/tasks/{_part(task_id)}", parser(Task), body=dict(options))


def update_task(task_id: str, change: TaskChange) -> Call[Task]:
    return Call("PATCH", f"/tasks/{_part(task_id)}", parser(Task), body=dict(change))


def delete_task(task_id: str) -> Call[None]:
    return Call("DELETE", f"/tasks/{_part(task_id)}", lambda content: None)


def promote(task_id: str, version: int) -> Call[Task]:
    return Call("POST", f"/tasks/{_part(task_id)}/promote", parser(Task), body={"version": version})


def export_task(task_id: str, version: int | None) -> Call[bytes]:
    return Call("GET", f"/tasks/{_part(task_id)}/export", lambda content: content, params=_given(version=version))


def list_inventories() -> Call[Page[Inventory]]:
    return Call("GET", "/inventories", page_parser(Inventory))


def get_inventory(name: str) -> Call[Inventory]:
    return Call("GET", f"/inventories/{_part(name)}", parser(Inventory))


def info() -> Call[Info]:
    return Call("GET", "/info", parser(Info))


def _part(text: str) -> str:
    """A path segment, so that no id can reach another route."""
    if text in ("", ".", ".."):
        raise ValueError(f"{text!r} is no id")
    return quote(text, safe="@")


def _given(**params: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in params.items() if value is not None}
