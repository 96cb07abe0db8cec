"""The engine behind its async front."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from server.engine.config import EngineConfig, StepStats
from server.engine.request import EngineRequest, FinishOutput, SamplingParams, TokenOutput
from server.engine.service import EngineService, TokenStream
from server.errors import Conflict, InvalidInput, TooLarge, Unavailable
from tests.unit.engine.driver import (
    CONTEXT,
    Driver,
    add_to_weights,
    make_model,
    random_prompt,
    reference_tokens,
)


class Front:
    """A running service and the driver whose engine it owns."""

    def __init__(self, config: EngineConfig) -> None:
        self.driver = Driver(make_model(), config)
        self.steps: list[StepStats] = []
        self.service = EngineService(self.driver.engine, on_step=self.steps.append)
        self.service.start()

    def submit(self, request_id: str, prompt: tuple[int, ...], **options: object) -> TokenStream:
        adapter = options.pop("adapter", None)
        params = SamplingParams(**{"max_new_tokens": 8, **options})
        return self.service.submit(EngineRequest(request_id, "t", prompt, params, adapter))

    def close(self) -> None:
        self.service.stop()
        self.driver.engine.check_integrity()
        assert not self.driver.engine.has_work


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    front = Front(EngineConfig(max_batch=4, max_context=CONTEXT, max_queue=50, prefill_chunk=16, threads=1))
    yield front
    front.close()


async def collect(stream: TokenStream) -> tuple[list[int], FinishOutput]:
    outputs = [output async for output in stream]
    assert all(isinstance(o, TokenOutput) for o in outputs[:-1])
    assert isinstance(outputs[-1], FinishOutput)
    return [o.token_id for o in outputs[:-1] if isinstance(o, TokenOutput)], outputs[-1]


async def test_many_requests_at_once_each_get_their_own_answer(front: Front) -> None:
    prompts = [random_prompt(n, 3 + n) for n in range(12)]
    handles = [front.driver.handle(n) if n % 3 else None for n in range(12)]
    streams = [front.submit(f"r{n}", p, adapter=h) for n, (p, h) in enumerate(zip(prompts, handles, strict=True))]
    answers = await asyncio.gather(*map(collect, streams))
    for (tokens, finish), prompt, handle in zip(answers, prompts, handles, strict=True):
        truth = add_to_weights(front.driver.plain, handle and handle.adapter)
        assert tokens == reference_tokens(truth, prompt, 8)
        assert finish.completion_tokens == len(tokens)
    assert front.service.num_open == 0
    assert max(s.rows for s in front.steps) > 1


async def test_refusals_are_raised_where_the_request_is_made(front: Front) -> None:
    with pytest.raises(TooLarge, match=f"{CONTEXT + 1} tokens and the context holds {CONTEXT}"):
        front.submit("long", random_prompt(0, CONTEXT + 1))
    with pytest.raises(InvalidInput, match="vocabulary"):
        front.submit("odd", (5000,))
    stream = front.submit("same", random_prompt(0, 4))
    with pytest.raises(Conflict, match="same"):
        front.submit("same", random_prompt(0, 4))
    assert (await collect(stream))[1].reason in ("stop", "length")
    assert front.service.num_open == 0


async def test_a_full_queue_is_refused_and_what_was_taken_is_answered() -> None:
    front = Front(EngineConfig(max_batch=1, max_context=CONTEXT, max_queue=3))
    streams = []

    def flood() -> None:
        for number in range(50):
            streams.append(front.submit(f"r{number}", random_prompt(number, 4), max_new_tokens=50, ignore_eos=True))

    with pytest.raises(Unavailable, match="queue is full") as caught:
        flood()
    assert caught.value.retry_after_s > 0
    assert 3 <= len(streams) < 50
    answers = await asyncio.gather(*map(collect, streams))
    assert {finish.reason for _, finish in answers} == {"length"}
    front.close()


async def test_leaving_a_stream_early_aborts_its_request(front: Front) -> None:
    async with front.submit("r", random_prompt(0, 4), max_new_tokens=50, ignore_eos=True) as stream:
        assert isinstance(await anext(stream), TokenOutput)
    await asyncio.wait_for(front.service.drain(), 10)
    assert front.service.num_open == 0
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_cancelled_reader_aborts_its_request(front: Front) -> None:
    async def read() -> None:
        async with front.submit("r", random_prompt(0, 4), max_new_tokens=50, ignore_eos=True) as stream:
            async for _ in stream:
                started.set()
                await asyncio.sleep(60)

    started = asyncio.Event()
    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reader
    assert await front.service.drain(timeout_s=10)


async def test_closing_an_answered_stream_is_harmless(front: Front) -> None:
    stream = front.submit("r", random_prompt(0, 4))
    await collect(stream)
    await stream.aclose()
    front.service.abort("r")
    front.service.abort("never seen")
    assert (await collect(front.submit("r", random_prompt(0, 4))))[1].reason in ("stop", "length")


async def test_an_abort_from_outside_ends_the_stream_with_abort(front: Front) -> None:
    stream = front.submit("r", random_prompt(0, 4), max_new_tokens=50, ignore_eos=True)
    await anext(stream)
    front.service.abort("r")
    assert (await collect(stream))[1].reason == "abort"


async def test_draining_finishes_what_is_open_and_refuses_the_rest(front: Front) -> None:
    stream = front.submit("r", random_prompt(0, 4))
    drained = asyncio.create_task(front.service.drain())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as caught:
        front.submit("late", random_prompt(0, 4))
    assert caught.value.code == "draining"
    assert front.service.draining
    assert (await collect(stream))[1].reason in ("stop", "length")
    assert await drained


async def test_draining_gives_up_after_its_time(front: Front) -> None:
    front.submit("r", random_prompt(0, 4), max_new_tokens=60, ignore_eos=True)
    assert not await front.service.drain(timeout_s=0.0)


async def test_stopping_ends_every_open_request_with_abort() -> None:
    front = Front(EngineConfig(max_batch=2, max_context=CONTEXT))
    streams = [front.submit(f"r{n}", random_prompt(n, 4), max_new_tokens=60, ignore_eos=True) for n in range(5)]
    await anext(streams[0])
    await asyncio.to_thread(front.close)
    reasons = [(await collect(stream))[1].reason for stream in streams]
    assert reasons[-1] == "abort"
    assert set(reasons) <= {"abort", "length"}
    with pytest.raises(Unavailable):
        front.submit("late", random_prompt(0, 4))


async def test_a_failing_step_ends_its_requests_and_the_service_lives_on(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(front.driver.runner, "run", fail)
        _, finish = await collect(front.submit("r", random_prompt(0, 4)))
    assert finish.reason == "error"
    assert "out of luck" in str(finish.error)
    with monkeypatch.context() as patch:
        patch.setattr(front.driver.engine.scheduler, "schedule", fail)
        _, finish = await collect(front.submit("s", random_prompt(0, 4)))
    assert finish.reason == "error"
    assert (await collect(front.submit("t", random_prompt(0, 4))))[1].reason in ("stop", "length")


async def test_a_report_that_fails_does_not_stop_the_engine() -> None:
    def report(_: StepStats) -> None:
        raise RuntimeError("no metrics today")

    driver = Driver(make_model())
    service = EngineService(driver.engine, on_step=report)
    service.start()
    for number in range(2):
        tokens, _ = await collect(service.submit(EngineRequest(f"r{number}", "t", random_prompt(0, 4))))
        assert tokens
    service.stop()


async def test_a_broken_engine_ends_every_open_request_and_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    front = Front(EngineConfig(max_batch=2, max_context=CONTEXT))
    monkeypatch.setattr(front.driver.runner, "run", fail)
    monkeypatch.setattr(front.driver.runner, "release", fail)
    streams = [front.submit(f"r{n}", random_prompt(n, 4)) for n in range(3)]
    for stream in streams:
        _, finish = await collect(stream)
        assert finish.reason == "error"
        assert "device lost" in str(finish.error)
    assert not front.service.accepting
    with pytest.raises(Unavailable):
        front.submit("late", random_prompt(0, 4))
    front.service.stop()


async def test_a_reader_whose_event_loop_is_gone_does_not_hold_up_others(front: Front) -> None:
    def read_elsewhere() -> None:
        async def begin() -> None:
            front.submit("lost", random_prompt(0, 4), max_new_tokens=60, ignore_eos=True)

        asyncio.run(begin())

    thread = threading.Thread(target=read_elsewhere)
    thread.start()
    thread.join()
    assert (await collect(front.submit("r", random_prompt(1, 4))))[1].reason in ("stop", "length")
    assert await front.service.drain(timeout_s=10)
    assert sum(stats.generated_tokens for stats in front.steps) < 40, "nobody reads the lost request; it went on"


async def test_a_service_that_was_not_started_refuses() -> None:
    service = EngineService(Driver(make_model()).engine)
    with pytest.raises(Unavailable):
        service.submit(EngineRequest("r", "t", (5,)))
