"""From inputs to answers: resolve the task, render, tokenise, run in the engine, read the tokens as text."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from server.answer_text import AnswerText
from server.backbone import Backbone
from server.engine.request import EngineRequest, FinishOutput, SamplingParams, TokenOutput
from server.engine.service import EngineService
from server.errors import DeadlineExceeded, InvalidInput, MHRError, TooLarge, Unavailable
from server.metrics import Metrics
from server.options import GenerationOptions, merge_options
from server.tasks import ResolvedTask, TaskCatalog
from server.training.prompts import encode_answer, encode_prompt, render_prompt

FinishReason = Literal["stop", "length", "stop_sequence"]
OnText = Callable[[int, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationCall:
    """One call. `options` holds the parameters that the caller set; the task's defaults fill in the others."""

    reference: str
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    raw_prompt: bool = False


@dataclass(frozen=True)
class TokenText:
    """One token with its text and log-probability."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class ChosenToken(TokenText):
    """A generated token and the likeliest ones at its place."""

    top: tuple[TokenText, ...]


@dataclass(frozen=True)
class ChoiceScore:
    """One given answer: `score` is `logprob`, the sum over its tokens, divided by their number."""

    text: str
    score: float
    logprob: float
    tokens: int


@dataclass(frozen=True)
class Output:
    """One answer; `index` is input number * n + answer number."""

    index: int
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[ChosenToken, ...] | None = None
    scores: tuple[ChoiceScore, ...] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of the whole call; a prompt counts once however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds since the call arrived; `queue_ms` is the longest wait of one of its sequences."""

    queue_ms: float
    ttft_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Answer:
    """The answer to one call."""

    id: str
    task_id: str
    version: int | None
    outputs: tuple[Output, ...]
    usage: Usage
    timing: Timing


@dataclass
class _Run:
    """What the sequences of one call share."""

    id: str
    task: ResolvedTask
    sampling: SamplingParams
    options: GenerationOptions
    raw_prompt: bool
    on_text: OnText | None
    start_s: float
    first_token_s: float | None = None
    queue_s: float = 0.0


class GenerationService:
    """Answers calls. Cancelling a call's coroutine aborts its sequences in the engine."""

    def __init__(
        self,
        catalog: TaskCatalog,
        engine: EngineService,
        backbone: Backbone,
        metrics: Metrics,
        *,
        max_context: int,
        max_sequences: int,
        timeout_s: float,
    ) -> None:
        self._catalog = catalog
        self._engine = engine
        self._tokenizer = backbone.tokenizer
        self._eos_token_ids = backbone.eos_token_ids
        self._metrics = metrics
        self._max_context = max_context
        self._max_sequences = max_sequences
        self._timeout_s = timeout_s

    async def answer(
        self, call: GenerationCall, *, on_text: OnText | None = None, on_task: Callable[[str], None] | None = None
    ) -> Answer:
        """Answer a call; `on_text(index, text)` gets every piece as it comes, `on_task(task_id)` the task once known.

        Raises NotFound, AdapterUnavailable, InvalidInput, TooLarge, Unavailable or DeadlineExceeded.
        """
        start_s = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s), self._resolved(call.reference) as task:
                if on_task is not None:
                    on_task(task.task_id)
                sampling, options = merge_options(task.defaults, call.options)
                run = _Run(
                    id=f"gen-{uuid.uuid4().hex[:16]}",
                    task=task,
                    sampling=sampling,
                    options=options,
                    raw_prompt=call.raw_prompt,
                    on_text=on_text,
                    start_s=start_s,
                )
                self._check_size(call, options)
                prompts = await asyncio.to_thread(self._encode_prompts, run, call.inputs)
                outputs = await (self._generate(run, prompts) if options.choices is None else self._rank(run, prompts))
        except TimeoutError:
            self._metrics.cancelled("deadline")
            raise DeadlineExceeded(
                f"the answer was not finished within {self._timeout_s:g} s; ask for fewer tokens or inputs, "
                "or raise MHR_REQUEST_TIMEOUT_S"
            ) from None
        except asyncio.CancelledError:
            self._metrics.cancelled("client_gone")
            raise
        return _answer(run, prompts, outputs)

    @asynccontextmanager
    async def _resolved(self, reference: str) -> AsyncIterator[ResolvedTask]:
        """The task, released at the end, also when the caller is cancelled while a thread still resolves it."""
        resolving = asyncio.ensure_future(asyncio.to_thread(self._catalog.resolve, reference))
        try:
            task = await asyncio.shield(resolving)
        except asyncio.CancelledError:
            resolving.add_done_callback(_release_late)
            raise
        try:
            yield task
        finally:
            task.release()

    def _check_size(self, call: GenerationCall, options: GenerationOptions) -> None:
        per_input = options.n if options.choices is None else len(options.choices)
        total = len(call.inputs) * per_input
        if total > self._max_sequences:
            raise TooLarge(
                f"{len(call.inputs)} inputs with {per_input} answers each are {total} sequences; one call may have "
                f"{self._max_sequences} (MHR_MAX_INPUTS). Send several calls",
                param="inputs",
            )

    def _encode_prompts(self, run: _Run, inputs: Sequence[str]) -> list[tuple[int, ...]]:
        prompts = []
        for number, text in enumerate(inputs):
            prompt = text if run.raw_prompt else render_prompt(run.task.prompt_format, run.task.instruction, text)
            token_ids = tuple(encode_prompt(self._tokenizer, prompt))
            if not token_ids:
                raise InvalidInput(
                    f"inputs[{number}] has no tokens; send text that the model can read", param=f"inputs[{number}]"
                )
            self._check_fits(len(token_ids), number)
            prompts.append(token_ids)
        return prompts

    def _check_fits(self, num_tokens: int, number: int) -> None:
        if num_tokens >= self._max_context:
            raise TooLarge(
                f"inputs[{number}] makes a prompt of {num_tokens} tokens; the context holds {self._max_context}, "
                "the answer included. Shorten the input",
                param=f"inputs[{number}]",
                code="context_exceeded",
            )

    # --- generating ---------------------------------------------------------------------------------------------

    async def _generate(self, run: _Run, prompts: Sequence[tuple[int, ...]]) -> list[Output]:
        n = run.options.n
        return await _gather(
            self._one_answer(run, number * n + copy, prompt, copy)
            for number, prompt in enumerate(prompts)
            for copy in range(n)
        )

    async def _one_answer(self, run: _Run, index: int, prompt: tuple[int, ...], copy: int) -> Output:
        sampling = run.sampling
        if copy and sampling.seed is not None:
            sampling = SamplingParams(**{**vars(sampling), "seed": sampling.seed + copy})
        request = EngineRequest(
            id=f"{run.id}-{index}",
            task=run.task.task_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            adapter=run.task.handle,
        )
        text = AnswerText(
            self._tokenizer,
            run.options.stop,
            min_tokens=sampling.min_new_tokens,
            answers_prompt=not run.raw_prompt,
        )
        tokens: list[TokenOutput] = []
        clock = _TokenClock(self._metrics, run)
        finish: FinishOutput | None = None
        async with self._engine.submit(request) as events:
            async for event in events:
                if isinstance(event, FinishOutput):
                    finish = event
                elif not text.stopped:
                    clock.tick()
                    tokens.append(event)
                    self._take(run, index, event, text, sampling.ignore_eos)
                    if text.stopped:
                        self._engine.abort(request.id)
        assert finish is not None, f"the engine gave no last event for {request.id}"
        self._account(run, finish, len(tokens))
        reason = _finish_reason(finish, text.stopped)
        _hand_out(run, index, text.finish())
        return Output(
            index=index,
            text=text.text,
            finish_reason="stop_sequence" if text.stopped else reason,
            prompt_tokens=len(prompt),
            completion_tokens=len(tokens),
            logprobs=None if sampling.logprobs is None else tuple(self._chosen(token) for token in tokens),
        )

    def _take(self, run: _Run, index: int, token: TokenOutput, text: AnswerText, ignore_eos: bool) -> None:
        if token.token_id not in self._eos_token_ids or ignore_eos:
            _hand_out(run, index, text.push(token.token_id))

    def _chosen(self, token: TokenOutput) -> ChosenToken:
        assert token.logprob is not None
        top = tuple(TokenText(t.token_id, self._text_of(t.token_id), t.logprob) for t in token.top_logprobs)
        return ChosenToken(token.token_id, self._text_of(token.token_id), token.logprob, top)

    def _text_of(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id])
        assert isinstance(text, str)
        return text

    # --- ranking ------------------------------------------------------------------------------------------------

    async def _rank(self, run: _Run, prompts: Sequence[tuple[int, ...]]) -> list[Output]:
        assert run.options.choices is not None
        choices = [(choice, self._encode_choice(choice, run.raw_prompt)) for choice in run.options.choices]
        longest = max(len(token_ids) for _, token_ids in choices)
        for number, prompt in enumerate(prompts):
            self._check_fits(len(prompt) + longest - 1, number)
        scores: list[ChoiceScore] = await _gather(
            self._score(run, f"{number}-{place}", prompt, choice, token_ids)
            for number, prompt in enumerate(prompts)
            for place, (choice, token_ids) in enumerate(choices)
        )
        outputs = []
        for number, prompt in enumerate(prompts):
            own = tuple(scores[number * len(choices) : (number + 1) * len(choices)])
            best = max(own, key=lambda score: score.score)
            outputs.append(Output(number, best.text, "stop", len(prompt), 0, scores=own))
        return outputs

    def _encode_choice(self, choice: str, raw_prompt: bool) -> tuple[int, ...]:
        if raw_prompt:
            return tuple(self._tokenizer(choice, add_special_tokens=False)["input_ids"])
        return tuple(encode_answer(self._tokenizer, choice))

    async def _score(
        self, run: _Run, suffix: str, prompt: tuple[int, ...], choice: str, token_ids: tuple[int, ...]
    ) -> ChoiceScore:
        request = EngineRequest(
            id=f"{run.id}-{suffix}",
            task=run.task.task_id,
            prompt_token_ids=prompt,
            adapter=run.task.handle,
            score_token_ids=token_ids,
        )
        finish: FinishOutput | None = None
        async with self._engine.submit(request) as events:
            async for event in events:
                if isinstance(event, FinishOutput):
                    finish = event
        assert finish is not None, f"the engine gave no last event for {request.id}"
        self._account(run, finish, 0)
        _finish_reason(finish, stopped=False)
        logprob = sum(finish.token_logprobs)
        return ChoiceScore(choice, logprob / len(token_ids), logprob, len(token_ids))

    def _account(self, run: _Run, finish: FinishOutput, generated: int) -> None:
        queue_s = finish.timing.queue_s
        run.queue_s = max(run.queue_s, queue_s or 0.0)
        self._metrics.sequence(
            task=run.task.task_id, prompt_tokens=finish.prompt_tokens, generated_tokens=generated, queue_s=queue_s
        )


class _TokenClock:
    """Observes the latencies of one sequence."""

    def __init__(self, metrics: Metrics, run: _Run) -> None:
        self._metrics = metrics
        self._run = run
        self._last_s: float | None = None

    def tick(self) -> None:
        now_s = time.perf_counter()
        if self._last_s is None:
            self._metrics.first_token(now_s - self._run.start_s)
            self._run.first_token_s = self._run.first_token_s or now_s
        else:
            self._metrics.next_token(now_s - self._last_s)
        self._last_s = now_s


def _hand_out(run: _Run, index: int, text: str) -> None:
    if text and run.on_text is not None:
        run.on_text(index, text)


def _finish_reason(finish: FinishOutput, stopped: bool) -> FinishReason:
    """Why the engine ended a sequence. Raises its error, or Unavailable when the server is stopping."""
    if stopped:
        return "stop_sequence"
    if finish.reason == "error":
        raise finish.error or MHRError("the engine failed on this request; the server's log has the cause")
    if finish.reason == "abort":
        raise Unavailable("the server stopped before the answer was finished; send the request again", code="stopping")
    return "length" if finish.reason == "length" else "stop"


def _answer(run: _Run, prompts: Sequence[tuple[int, ...]], outputs: Sequence[Output]) -> Answer:
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    completion_tokens = sum(output.completion_tokens for output in outputs)
    first_ms = None if run.first_token_s is None else (run.first_token_s - run.start_s) * 1000
    return Answer(
        id=run.id,
        task_id=run.task.task_id,
        version=run.task.version,
        outputs=tuple(outputs),
        usage=Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens),
        timing=Timing(run.queue_s * 1000, first_ms, (time.perf_counter() - run.start_s) * 1000),
    )


def _release_late(resolving: asyncio.Future[ResolvedTask]) -> None:
    if not resolving.cancelled() and resolving.exception() is None:
        resolving.result().release()


async def _gather(coroutines: Any) -> list[T]:
    """All results in order; the first error cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[T]] = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
