"""The generation service over an engine that plays a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import pytest

from server.backbone import Backbone
from server.engine.request import EngineRequest, FinishOutput, Output, RequestTiming, TokenOutput
from server.errors import AdapterUnavailable, DeadlineExceeded, MHRError, TooLarge, Unavailable
from server.generation import GenerationCall, GenerationService
from server.metrics import Metrics
from server.tasks import ResolvedTask, TaskCatalog

Script = Callable[[EngineRequest], Iterable[Output]]
TIMING = RequestTiming(queue_s=0.25, first_token_s=0.5, total_s=1.0)


class ScriptedStream:
    def __init__(self, outputs: Iterable[Output], closed: list[str], request_id: str) -> None:
        self._outputs = iter(outputs)
        self._closed = closed
        self._request_id = request_id
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closed.append(self._request_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        for output in self._outputs:
            self._ended = isinstance(output, FinishOutput)
            return output
        return await asyncio.Future()  # a script without an end


class ScriptedEngine:
    def __init__(self, script: Script) -> None:
        self._script = script
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []
        self.closed: list[str] = []

    def submit(self, request: EngineRequest) -> ScriptedStream:
        self.requests.append(request)
        return ScriptedStream(self._script(request), self.closed, request.id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def finish(request: EngineRequest, reason: Any, error: MHRError | None = None, **more: Any) -> FinishOutput:
    return FinishOutput(request.id, reason, len(request.prompt_token_ids), 0, TIMING, error=error, **more)


@pytest.fixture
def service(catalog: TaskCatalog, backbone: Backbone) -> Callable[..., tuple[GenerationService, ScriptedEngine]]:
    def make(script: Script, timeout_s: float = 5.0) -> tuple[GenerationService, ScriptedEngine]:
        engine = ScriptedEngine(script)
        made = GenerationService(
            catalog,
            engine,  # type: ignore[arg-type]
            backbone,
            Metrics(),
            max_context=64,
            max_sequences=6,
            timeout_s=timeout_s,
        )
        return made, engine

    return make


def says(backbone: Backbone, text: str, reason: str = "stop") -> Script:
    token_ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]

    def script(request: EngineRequest) -> Iterable[Output]:
        for token_id in token_ids:
            yield TokenOutput(request.id, token_id)
        yield finish(request, reason)

    return script


def call(reference: str = "base", inputs: tuple[str, ...] = ("hello",), **options: Any) -> GenerationCall:
    return GenerationCall(reference, inputs, options)


async def test_text_is_handed_out_as_it_comes_and_joined_at_the_end(service: Any, backbone: Backbone) -> None:
    made, engine = service(says(backbone, " Zürich"))
    pieces: list[tuple[int, str]] = []
    tasks: list[str] = []
    answer = await made.answer(call(), on_text=lambda *piece: pieces.append(piece), on_task=tasks.append)
    assert "".join(text for _, text in pieces) == answer.outputs[0].text == "Zürich"
    assert answer.outputs[0].finish_reason == "stop"
    assert answer.timing.queue_ms == 250
    assert tasks == ["base"]
    assert engine.closed == [engine.requests[0].id]


async def test_copies_get_seeds_of_their_own(service: Any, backbone: Backbone) -> None:
    made, engine = service(says(backbone, "x"))
    await made.answer(call(inputs=("a", "b"), n=3, seed=10))
    assert [request.sampling.seed for request in engine.requests] == [10, 11, 12] * 2
    assert len({request.id for request in engine.requests}) == 6


async def test_a_stop_string_aborts_in_the_engine_and_waits_for_the_end(service: Any, backbone: Backbone) -> None:
    made, engine = service(says(backbone, "one. two. three", "abort"))
    answer = await made.answer(call(stop=["."]))
    assert (answer.outputs[0].text, answer.outputs[0].finish_reason) == ("one", "stop_sequence")
    assert answer.usage.completion_tokens == len("one.")
    assert engine.aborted == [engine.requests[0].id]


@pytest.mark.parametrize(
    ("reason", "error", "expected"),
    [
        ("abort", None, Unavailable),
        ("error", AdapterUnavailable("the adapter diverged"), AdapterUnavailable),
        ("error", None, MHRError),
    ],
)
async def test_an_end_that_is_no_answer_is_an_error(
    service: Any, reason: str, error: MHRError | None, expected: type[MHRError]
) -> None:
    made, _ = service(lambda request: [finish(request, reason, error)])
    with pytest.raises(expected):
        await made.answer(call())


async def test_the_first_failure_ends_the_other_sequences(service: Any) -> None:
    def script(request: EngineRequest) -> Iterable[Output]:
        return [finish(request, "error", AdapterUnavailable("broken"))] if request.id.endswith("-1") else []

    made, engine = service(script)
    with pytest.raises(AdapterUnavailable, match="broken"):
        await made.answer(call(inputs=("a", "b", "c")))
    assert len(engine.closed) == 3


async def test_the_deadline_ends_all_sequences(service: Any) -> None:
    made, engine = service(lambda request: [], timeout_s=0.05)
    with pytest.raises(DeadlineExceeded, match=r"0.05 s"):
        await made.answer(call(inputs=("a", "b")))
    assert len(engine.closed) == 2


async def test_too_many_sequences_are_refused_before_the_engine_sees_one(service: Any, backbone: Backbone) -> None:
    made, engine = service(says(backbone, "x"))
    for refused in (call(inputs=("a",) * 7), call(inputs=("a", "b"), n=4), call(choices=["x"] * 7)):
        with pytest.raises(TooLarge, match="MHR_MAX_INPUTS"):
            await made.answer(refused)
    assert engine.requests == []


async def test_a_caller_that_leaves_while_its_task_is_resolved_leaves_no_pin(
    service: Any, backbone: Backbone, catalog: TaskCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_resolve, released = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    class Pinned(ResolvedTask):
        def release(self) -> None:
            loop.call_soon_threadsafe(released.set)

    def slow(reference: str) -> ResolvedTask:
        may_resolve.wait(5)
        return Pinned(reference)

    monkeypatch.setattr(catalog, "resolve", slow)
    made, engine = service(says(backbone, "x"))
    answering = asyncio.create_task(made.answer(call("capital")))
    await asyncio.sleep(0.05)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    may_resolve.set()
    await asyncio.wait_for(released.wait(), 5)
    assert engine.requests == []


async def test_choices_are_scored_and_the_likeliest_mean_wins(service: Any) -> None:
    def script(request: EngineRequest) -> Iterable[Output]:
        assert request.score_token_ids is not None
        each = -2.0 if len(request.score_token_ids) > 4 else -1.9
        yield finish(request, "scored", token_logprobs=(each,) * len(request.score_token_ids))

    made, engine = service(script)
    answer = await made.answer(call(choices=["yes", "perhaps"]))
    [output] = answer.outputs
    assert output.text == "yes"
    assert [round(score.score, 6) for score in output.scores] == [-1.9, -2.0]
    assert [request.prompt_token_ids for request in engine.requests] == [engine.requests[0].prompt_token_ids] * 2
