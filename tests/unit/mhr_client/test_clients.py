"""Both clients against canned answers. Each test runs once per client; `run` hides which."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

import mhr_client
from mhr_client import AsyncClient, AsyncJob, Client, Job, RetryPolicy

BASE = "http://server.test"


class Driver:
    """Calls either client by method name and returns plain results, so that one test speaks for both."""

    def __init__(self, kind: str, transport: httpx.MockTransport, **options: Any) -> None:
        self._loop = asyncio.Runner() if kind == "async" else None
        cls = AsyncClient if self._loop else Client
        self.client: Any = cls(BASE, transport=transport, **options)

    def close(self) -> None:
        if self._loop is None:
            self.client.close()
        else:
            self._loop.run(self.client.close())
            self._loop.close()

    def call(self, name: str, *args: Any, on: Any = None, **options: Any) -> Any:
        result = getattr(on or self.client, name)(*args, **options)
        return result if self._loop is None else self._loop.run(result)

    def items(self, name: str, *args: Any, **options: Any) -> list[Any]:
        result = getattr(self.client, name)(*args, **options)
        if self._loop is None:
            return list(result)

        async def collect() -> list[Any]:
            return [item async for item in result]

        return self._loop.run(collect())

    def first_item_then_close(self, name: str, *args: Any) -> Any:
        result = getattr(self.client, name)(*args)
        if self._loop is None:
            item = next(result)
            result.close()
            return item

        async def take() -> Any:
            item = await anext(result)
            await result.aclose()
            return item

        return self._loop.run(take())


@pytest.fixture(params=["sync", "async"])
def make_driver(request: pytest.FixtureRequest, fake_server: Any) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(**options: Any) -> Driver:
        drivers.append(Driver(request.param, fake_server.transport, **options))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    return make_driver()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that a client makes, none of them real.

    Only the clients' own names are replaced: a server in another thread still sleeps through its own `asyncio.sleep`.
    """
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("mhr_client.client.sleep", pauses.append)
    monkeypatch.setattr("mhr_client.async_client.sleep", sleep)
    return pauses


# --- answers ----------------------------------------------------------------------------------------------------


def test_generate_sends_only_what_was_given(driver: Driver, fake_server: Any, generation: dict[str, Any]) -> None:
    fake_server.will_json(generation)
    answer = driver.call("generate", "ticket-tags", "The invoice is wrong.", max_new_tokens=4, stop=["\n"])
    request = fake_server.requests[0]
    assert (request.method, str(request.url)) == ("POST", f"{BASE}/generate")
    assert fake_server.sent_json() == {
        "task_id": "ticket-tags",
        "inputs": "The invoice is wrong.",
        "parameters": {"max_new_tokens": 4, "stop": ["\n"]},
    }
    assert answer.text == "billing"
    assert (answer.version, answer.usage.total_tokens, answer.timing.ttft_ms) == (1, 11, 12.5)
    assert answer.outputs[0].finish_reason == "stop"


def test_generate_many_inputs(driver: Driver, fake_server: Any, generation: dict[str, Any]) -> None:
    outputs = [generation["outputs"][0] | {"index": i, "text": f"answer {i}"} for i in range(2)]
    fake_server.will_json(generation | {"outputs": outputs})
    answer = driver.call("generate", "base", ("one", "two"), raw_prompt=True)
    assert fake_server.sent_json() == {"task_id": "base", "inputs": ["one", "two"], "raw_prompt": True}
    assert answer.texts == ["answer 0", "answer 1"]
    with pytest.raises(ValueError, match="there are 2 answers"):
        _ = answer.text


def test_logprobs_and_scores_are_typed(driver: Driver, fake_server: Any, generation: dict[str, Any]) -> None:
    token = {"token_id": 5, "token": "b", "logprob": -0.5}
    output = generation["outputs"][0] | {
        "logprobs": [token | {"top": [token]}],
        "scores": [{"text": "billing", "score": -1, "logprob": -2, "tokens": 2}],
    }
    fake_server.will_json(generation | {"outputs": [output]})
    parsed = driver.call("generate", "ticket-tags", "x").outputs[0]
    assert parsed.logprobs == (mhr_client.Logprob(5, "b", -0.5, (mhr_client.TokenLogprob(5, "b", -0.5),)),)
    assert parsed.scores == (mhr_client.Score("billing", -1.0, -2.0, 2),)


def test_stream_yields_tokens_and_then_the_answer(
    driver: Driver, fake_server: Any, generation: dict[str, Any], sse: Callable[..., bytes]
) -> None:
    body = b": ping\r\n\r\n" + sse(
        ("token", {"index": 0, "text": "bill"}),
        ("later", {"a field": "of a newer server"}),
        ("token", {"index": 0, "text": "ing"}),
        ("done", generation),
    )
    fake_server.will(httpx.Response(200, content=body))
    *tokens, answer = driver.items("stream", "ticket-tags", "x", temperature=0.5)
    assert fake_server.sent_json()["stream"] is True
    assert fake_server.requests[0].headers["Accept"] == "text/event-stream"
    assert tokens == [mhr_client.Token(0, "bill"), mhr_client.Token(0, "ing")]
    assert answer.text == "billing"


def test_stream_can_be_left_early(driver: Driver, fake_server: Any, sse: Callable[..., bytes]) -> None:
    response = httpx.Response(
        200, content=sse(("token", {"index": 0, "text": "a"}), ("token", {"index": 0, "text": "b"}))
    )
    fake_server.will(response)
    assert driver.first_item_then_close("stream", "t", "x").text == "a"
    assert response.is_closed


def test_error_inside_a_stream_is_raised_by_its_type(
    driver: Driver, fake_server: Any, sse: Callable[..., bytes], error_body: Callable[..., dict[str, Any]]
) -> None:
    error = error_body("deadline_exceeded", "the time ran out")
    fake_server.will(httpx.Response(200, content=sse(("token", {"index": 0, "text": "a"}), ("error", error))))
    with pytest.raises(mhr_client.DeadlineExceeded, match="the time ran out") as caught:
        driver.items("stream", "t", "x")
    assert (caught.value.status, caught.value.code) == (None, "deadline_exceeded")


def test_stream_without_an_end_is_an_error(driver: Driver, fake_server: Any, sse: Callable[..., bytes]) -> None:
    fake_server.will(httpx.Response(200, content=sse(("token", {"index": 0, "text": "a"}))))
    with pytest.raises(mhr_client.ProtocolError, match="before the answer was complete"):
        driver.items("stream", "t", "x")


def test_refused_stream_raises_before_any_token(
    driver: Driver, fake_server: Any, error_body: Callable[..., dict[str, Any]]
) -> None:
    fake_server.will_json(error_body(), status=404)
    with pytest.raises(mhr_client.NotFound):
        driver.items("stream", "t", "x")


# --- adaptation -------------------------------------------------------------------------------------------------


def test_adapt_takes_pairs_and_mappings(driver: Driver, fake_server: Any, job: dict[str, Any]) -> None:
    fake_server.will_json(job, status=202)
    handle = driver.call(
        "adapt",
        "ticket-tags",
        [("a", "x"), ("b", ("y", "z")), {"input": "c", "output": "w"}],
        instruction="Name the product area.",
        method="mhr-z",
        idempotency_key="once",
    )
    assert fake_server.sent_json() == {
        "task_id": "ticket-tags",
        "examples": [
            {"input": "a", "output": "x"},
            {"input": "b", "output": ["y", "z"]},
            {"input": "c", "output": "w"},
        ],
        "instruction": "Name the product area.",
        "method": "mhr-z",
    }
    assert fake_server.requests[0].headers["Idempotency-Key"] == "once"
    assert handle.id == job["id"]
    assert handle.info.created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_wait_tells_of_each_change_once(
    driver: Driver, fake_server: Any, job: dict[str, Any], sleeps: list[float]
) -> None:
    running = job | {"status": "running", "progress": {"step": 1}}
    done = job | {"status": "succeeded", "version": 2}
    fake_server.will_json(job, job, running, running, done)
    seen: list[str] = []
    handle = driver.call("get_job", job["id"])
    info = driver.call("wait", lambda state: seen.append(state.status), on=handle, poll_s=0.5)
    assert seen == ["queued", "running", "succeeded"]
    assert (info.version, handle.info) == (2, info)
    assert sleeps == [0.5] * 3


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_wait_raises_when_the_job_did_not_succeed(
    driver: Driver, fake_server: Any, job: dict[str, Any], status: str
) -> None:
    fake_server.will_json(job, job | {"status": status, "error": "the loss is not a number"})
    handle = driver.call("get_job", job["id"])
    with pytest.raises(mhr_client.JobFailed, match=f"{status}: the loss is not a number") as caught:
        driver.call("wait", on=handle)
    assert caught.value.job.status == status


def test_wait_gives_up_in_time(driver: Driver, fake_server: Any, job: dict[str, Any]) -> None:
    fake_server.will_json(job, job)
    handle = driver.call("get_job", job["id"])
    with pytest.raises(mhr_client.WaitTimeout, match="still queued after 0 s"):
        driver.call("wait", on=handle, timeout_s=0)


def test_cancel_and_events(driver: Driver, fake_server: Any, job: dict[str, Any]) -> None:
    event = {"seq": 3, "type": "loss", "data": {"loss": 1.5}, "created_at": "2026-01-02T03:04:05Z"}
    fake_server.will_json(job, job | {"status": "cancelled"}, {"data": [event], "next_cursor": None})
    handle = driver.call("get_job", job["id"])
    assert driver.call("cancel", on=handle).status == "cancelled"
    events = driver.call("events", on=handle, after=2)
    assert [(e.seq, e.data) for e in events] == [(3, {"loss": 1.5})]
    assert [f"{r.method} {r.url.raw_path.decode()}" for r in fake_server.requests[1:]] == [
        f"POST /jobs/{job['id']}/cancel",
        f"GET /jobs/{job['id']}/events?after=2",
    ]


# --- tasks, inventories, the server -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "options", "line", "body"),
    [
        ("get_task", ["ticket-tags"], {}, "GET /tasks/ticket-tags", None),
        ("get_task", ["ticket-tags@3"], {}, "GET /tasks/ticket-tags@3", None),
        ("put_task", ["t"], {"instruction": "i", "kind": "mu"}, "PUT /tasks/t", {"instruction": "i", "kind": "mu"}),
        ("update_task", ["t"], {"defaults": {"seed": 1}}, "PATCH /tasks/t", {"defaults": {"seed": 1}}),
        ("promote", ["t", 2], {}, "POST /tasks/t/promote", {"version": 2}),
    ],
)
def test_task_calls(
    driver: Driver,
    fake_server: Any,
    task: dict[str, Any],
    name: str,
    args: list[Any],
    options: dict[str, Any],
    line: str,
    body: Any,
) -> None:
    fake_server.will_json(task)
    assert driver.call(name, *args, **options).id == "ticket-tags"
    request = fake_server.requests[0]
    assert f"{request.method} {request.url.raw_path.decode()}" == line
    assert (fake_server.sent_json() if request.content else None) == body


def test_delete_task_needs_no_answer(driver: Driver, fake_server: Any) -> None:
    fake_server.will(httpx.Response(204))
    assert driver.call("delete_task", "t") is None
    assert fake_server.requests[0].method == "DELETE"


def test_lists_are_pages_and_iteration_follows_them(driver: Driver, fake_server: Any, task: dict[str, Any]) -> None:
    fake_server.will_json(
        {"data": [task | {"id": "a"}], "next_cursor": "a"},
        {"data": [task | {"id": "a"}], "next_cursor": "a"},
        {"data": [task | {"id": "b"}], "next_cursor": None},
    )
    page = driver.call("list_tasks", limit=1, prefix="t")
    assert ([t.id for t in page.data], page.next_cursor) == (["a"], "a")
    assert [t.id for t in driver.items("iter_tasks")] == ["a", "b"]
    assert [r.url.query.decode() for r in fake_server.requests] == ["limit=1&prefix=t", "", "cursor=a"]


def test_list_jobs_filters(driver: Driver, fake_server: Any, job: dict[str, Any]) -> None:
    fake_server.will_json({"data": [job], "next_cursor": None})
    page = driver.call("list_jobs", status="queued", task_id="ticket-tags")
    assert page.data[0].id == job["id"]
    assert dict(fake_server.requests[0].url.params) == {"status": "queued", "task_id": "ticket-tags"}


def test_export_is_bytes(driver: Driver, fake_server: Any) -> None:
    fake_server.will(httpx.Response(200, content=b"tar\x00"))
    assert driver.call("export_task", "t", version=2) == b"tar\x00"
    assert fake_server.requests[0].url.raw_path == b"/tasks/t/export?version=2"


def test_inventories_and_info(driver: Driver, fake_server: Any) -> None:
    inventory = {
        "name": "superni",
        "digest": "ab",
        "served": True,
        "fits": True,
        "backbone_fingerprint": "cd",
        "num_skills": 8,
        "num_heads": 8,
        "rank": 4,
        "alpha": 1,
        "size_bytes": 10,
        "metadata": {},
        "created_at": "2026-01-02T03:04:05+00:00",
    }
    info = {
        "version": "0.1.0",
        "status": "ready",
        "backbone": {"name": "tiny", "fingerprint": "cd", "context_length": 64, "device": "cpu", "dtype": "float32"},
        "inventory": None,
        "tasks": 3,
        "settings": {},
    }
    fake_server.will_json(
        {"data": [inventory], "next_cursor": None}, inventory | {"linears": {"q": [8, 8]}, "tasks": ["t"]}, info
    )
    assert driver.call("list_inventories")[0].linears is None
    assert driver.call("get_inventory", "superni").tasks == ("t",)
    assert driver.call("info").backbone.context_length == 64


# --- errors and retries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, mhr_client.InvalidRequest),
        (401, mhr_client.AuthenticationError),
        (403, mhr_client.AuthenticationError),
        (404, mhr_client.NotFound),
        (409, mhr_client.Conflict),
        (413, mhr_client.TooLarge),
        (422, mhr_client.InvalidRequest),
        (424, mhr_client.AdapterUnavailable),
        (429, mhr_client.RateLimited),
        (500, mhr_client.ServerError),
        (503, mhr_client.Unavailable),
        (504, mhr_client.DeadlineExceeded),
    ],
)
def test_errors_by_status(
    driver: Driver,
    fake_server: Any,
    error_body: Callable[..., dict[str, Any]],
    status: int,
    error: type[mhr_client.APIError],
) -> None:
    fake_server.will_json(error_body("some_type", "what to do", "inputs[0]"), status=status)
    with pytest.raises(error, match="what to do") as caught:
        driver.call("generate", "t", "x")
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.type, caught.value.param) == (status, "some_type", "inputs[0]")
    assert len(fake_server.requests) == 1


def test_refusal_by_another_program_is_still_an_api_error(driver: Driver, fake_server: Any) -> None:
    fake_server.will(httpx.Response(502, content=b"<html>bad gateway"))
    with pytest.raises(mhr_client.ServerError, match="answered 502 without an explanation"):
        driver.call("info")


@pytest.mark.parametrize("content", [b"<html>", b"[]", b"{}", b'{"data": 3}'])
def test_success_by_another_program_is_a_protocol_error(driver: Driver, fake_server: Any, content: bytes) -> None:
    fake_server.will(httpx.Response(200, content=content), httpx.Response(200, content=content))
    for name in ("info", "list_tasks"):
        with pytest.raises(mhr_client.ProtocolError):
            driver.call(name)


def test_failed_connects_are_retried_with_growing_pauses(
    make_driver: Callable[..., Driver], fake_server: Any, generation: dict[str, Any], sleeps: list[float]
) -> None:
    fake_server.will(httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"))
    fake_server.will_json(generation)
    driver = make_driver(retry=RetryPolicy(retries=2, backoff_s=0.1))
    assert driver.call("generate", "t", "x").text == "billing"
    assert sleeps == [0.1, 0.2]


def test_failed_connects_end_in_an_error_with_a_remedy(
    make_driver: Callable[..., Driver], fake_server: Any, sleeps: list[float]
) -> None:
    fake_server.will(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(mhr_client.ConnectionFailed, match="Is the server running there") as caught:
        make_driver(retry=RetryPolicy(retries=2)).call("info")
    assert not caught.value.reached
    assert isinstance(caught.value.__cause__, httpx.ConnectError)
    assert len(sleeps) == 2


def test_broken_connection_is_not_retried(driver: Driver, fake_server: Any, sleeps: list[float]) -> None:
    fake_server.will(httpx.ReadTimeout("no answer"))
    with pytest.raises(mhr_client.ConnectionFailed) as caught:
        driver.call("adapt", "t", [("a", "b"), ("c", "d")])
    assert caught.value.reached
    assert sleeps == []


def test_busy_server_is_asked_again_when_it_says(
    driver: Driver,
    fake_server: Any,
    generation: dict[str, Any],
    error_body: Callable[..., dict[str, Any]],
    sleeps: list[float],
) -> None:
    fake_server.will_json(error_body("unavailable"), status=503, headers={"Retry-After": "2"})
    fake_server.will_json(generation)
    assert driver.call("generate", "t", "x").text == "billing"
    assert sleeps == [2.0]


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "3600"}, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}])
def test_busy_server_without_a_near_time_is_not_asked_again(
    driver: Driver,
    fake_server: Any,
    error_body: Callable[..., dict[str, Any]],
    sleeps: list[float],
    headers: dict[str, str],
) -> None:
    fake_server.will_json(error_body("unavailable"), status=503, headers=headers)
    with pytest.raises(mhr_client.Unavailable):
        driver.call("generate", "t", "x")
    assert sleeps == []


def test_api_key_is_sent(make_driver: Callable[..., Driver], fake_server: Any, generation: dict[str, Any]) -> None:
    fake_server.will_json(generation)
    make_driver(api_key="secret").call("generate", "t", "x")
    assert fake_server.requests[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("bad", ["", ".", ".."])
def test_ids_cannot_reach_other_routes(driver: Driver, fake_server: Any, task: dict[str, Any], bad: str) -> None:
    with pytest.raises(ValueError, match="is no id"):
        driver.call("get_task", bad)
    fake_server.will_json(task)
    driver.call("get_task", "../jobs?x")
    assert fake_server.requests[0].url.raw_path == b"/tasks/..%2Fjobs%3Fx"


# --- the two clients agree --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sync", "other"), [(Client, AsyncClient), (Job, AsyncJob)])
def test_both_clients_have_the_same_methods_and_arguments(sync: type, other: type) -> None:
    def public(cls: type) -> dict[str, list[str]]:
        return {
            name: [str(p).split(":")[0] for p in inspect.signature(member).parameters.values()]
            for name, member in vars(cls).items()
            if not name.startswith("_") and callable(member)
        }

    assert public(sync) == public(other)
    for name in public(sync):
        assert getattr(sync, name).__doc__ == getattr(other, name).__doc__


def test_public_names_are_pinned() -> None:
    assert set(mhr_client.__all__) == {name for name in vars(mhr_client) if name[0].isupper()}
