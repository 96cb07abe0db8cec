from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from server.api.streaming import ClientGone, event, until_gone


def request_that_leaves_after(gone: asyncio.Event) -> Request:
    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


async def test_the_result_comes_when_the_client_stays() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    assert await until_gone(request_that_leaves_after(asyncio.Event()), work()) == 5


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        await until_gone(request_that_leaves_after(asyncio.Event()), work())


async def test_the_work_is_cancelled_and_over_when_the_client_leaves() -> None:
    gone, steps = asyncio.Event(), []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            steps.append("cleaned up")

    asyncio.get_running_loop().call_later(0.01, gone.set)
    with pytest.raises(ClientGone):
        await until_gone(request_that_leaves_after(gone), work())
    assert steps == ["cleaned up"]


async def test_the_work_is_cancelled_when_the_caller_is() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    waiting = asyncio.create_task(until_gone(request_that_leaves_after(asyncio.Event()), work()))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cancelled.is_set()


def test_an_event_is_one_line_of_json_whatever_the_text() -> None:
    text = event("token", {"text": "a\nb\r\u2028ü"}).encode().decode()
    assert text == 'event: token\ndata: {"text": "a\\nb\\r\u2028ü"}\n\n'
