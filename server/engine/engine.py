"""The engine: every request goes in by `add`, moves on by `step`, and ends in exactly one FinishOutput."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable

from server.engine.batch import Batch
from server.engine.config import EngineConfig, StepStats
from server.engine.request import EngineRequest, FinishReason, Output, Sequence, TokenOutput
from server.engine.runner import Runner
from server.engine.sampler import Choice, Sampler, score
from server.engine.scheduler import PrefillChunk, Scheduler, StepPlan
from server.engine.threads import compute_in_team
from server.errors import AdapterUnavailable, Conflict, InvalidInput, MHRError, TooLarge

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching of requests that each bring their own adapter. Not thread-safe; see EngineService."""

    def __init__(self, runner: Runner, config: EngineConfig, eos_token_ids: frozenset[int]) -> None:
        self.config = config
        self.scheduler = Scheduler(config, runner.prefixes.num_blocks)
        self._runner = runner
        self._sampler = Sampler(eos_token_ids)
        self._eos_token_ids = eos_token_ids
        self._events: list[Output] = []  # since the last step

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or hand out anything."""
        return self.scheduler.has_work or bool(self._events)

    def prepare_thread(self) -> None:
        """Apply the settings that belong to the thread that steps."""
        compute_in_team(self.config.threads)

    def check(self, request: EngineRequest) -> None:
        """Raise TooLarge or InvalidInput when the request cannot be served; safe in any thread."""
        limit = self.config.max_context
        if request.score_token_ids is None:
            tokens, length = request.prompt_token_ids, len(request.prompt_token_ids)
            if length >= limit:
                raise TooLarge(
                    f"the prompt has {length} tokens and the context holds {limit}, so nothing could be generated; "
                    f"send at most {limit - 1} tokens"
                )
        else:
            tokens = request.prompt_token_ids + request.score_token_ids
            if len(tokens) > limit:
                raise TooLarge(
                    f"prompt and scored tokens are {len(tokens)} tokens and the context holds {limit}; send fewer"
                )
        if not 0 <= min(tokens) <= max(tokens) < self._runner.vocab_size:
            raise InvalidInput(
                f"the token ids {min(tokens)} … {max(tokens)} are not all within the vocabulary of "
                f"{self._runner.vocab_size} tokens",
                param="prompt_token_ids",
            )

    def add(self, request: EngineRequest, arrival_s: float | None = None) -> None:
        """Take a request in; a refused one ends with reason "error" in the next step's outputs.

        Raises Conflict when a request of the same id is open.
        """
        if self.scheduler.find(request.id) is not None:
            raise Conflict(f"a request with the id {request.id!r} is open; use another id", param="id")
        sequence = Sequence(request, arrival_s=time.monotonic() if arrival_s is None else arrival_s)
        try:
            self.check(request)
            self.scheduler.add(sequence)
        except MHRError as error:
            self._events.append(sequence.finish("error", time.monotonic(), error))

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; an unknown or finished one is left alone."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self._finish(sequence, "abort")

    def step(self) -> tuple[list[Output], StepStats | None]:
        """Compute one step and return what happened since the last one; no stats when there was nothing to compute."""
        started_s = time.monotonic()
        plan = self._begin(self.scheduler.schedule())
        if not plan.sequences:
            return self._take_events(), None
        try:
            batch = self._runner.prepare(plan)
            logits = self._runner.run(batch)
            choices = self._sampler.sample(logits[: len(batch.sampled)], batch.sampled)
            scores = score(logits[len(batch.sampled) :], batch.score_targets)
        except Exception as error:
            logger.exception("an engine step failed; its %d requests end with an error", len(plan.sequences))
            self._fail(plan.sequences, MHRError(f"the engine failed: {error}; try again"))
            return self._take_events(), None
        stats = self._post_process(plan, batch, choices, scores, started_s)
        return self._take_events(), stats

    def fail_all(self, error: MHRError) -> list[Output]:
        """End every request with this error."""
        self._fail(self.scheduler.all_sequences(), error)
        return self._take_events()

    def abort_all(self) -> list[Output]:
        """End every request with reason "abort"."""
        for sequence in self.scheduler.all_sequences():
            self._finish(sequence, "abort")
        return self._take_events()

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of the keys and values that are kept of earlier prompts."""
        return self.scheduler.prefixes.num_used * self._runner.prefixes.block_bytes

    def check_integrity(self) -> None:
        """Assert that all slots are accounted for."""
        self.scheduler.check_integrity()
        self._runner.check_integrity()

    def _begin(self, plan: StepPlan) -> StepPlan:
        """Bring in the beginning sequences' adapters and prefixes; one whose adapter does not fit ends here."""
        for chunk in plan.prefill:
            if not chunk.begins_prefill:
                continue
            try:
                self._runner.bring_adapter(chunk.sequence)
                self._runner.load_prefix(chunk.sequence)
            except MHRError as error:
                self._finish(chunk.sequence, "error", error)
        return plan.without_finished()

    def _post_process(
        self, plan: StepPlan, batch: Batch, choices: list[Choice], scores: list[float], started_s: float
    ) -> StepStats:
        self.scheduler.advance(plan)
        now_s = time.monotonic()
        for sequence, choice in zip(batch.sampled, choices, strict=True):
            self._take_token(sequence, choice, now_s)
        remaining = iter(scores)
        for chunk in batch.scored:
            self._take_scores(chunk, [next(remaining) for _ in range(chunk.num_scored)])
        return StepStats(
            path=batch.path,
            decode_rows=len(plan.decode),
            prefill_tokens=plan.num_prefill_tokens,
            reused_tokens=plan.num_reused_tokens,
            generated_tokens=len(choices),
            distinct_tasks=len({s.request.task for s in plan.sequences}),
            seconds=now_s - started_s,
        )

    def _take_token(self, sequence: Sequence, choice: Choice, now_s: float) -> None:
        if choice.token_id is None:
            self._finish(sequence, "error", _not_finite(sequence))
            return
        request, sampling = sequence.request, sequence.request.sampling
        sequence.token_ids.append(choice.token_id)
        sequence.values_checked = True
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
            self._keep_prefix(sequence)
        self._events.append(TokenOutput(request.id, choice.token_id, choice.logprob, choice.top_logprobs))
        if choice.token_id in self._eos_token_ids and not sampling.ignore_eos:
            self._finish(sequence, "stop")
        elif (
            sequence.num_generated_tokens >= sampling.max_new_tokens
            or len(sequence.token_ids) >= self.config.max_context
        ):
            self._finish(sequence, "length")

    def _take_scores(self, chunk: PrefillChunk, scores: list[float]) -> None:
        sequence = chunk.sequence
        if not all(map(math.isfinite, scores)):
            self._finish(sequence, "error", _not_finite(sequence))
            return
        sequence.token_logprobs += scores
        if chunk.completes_prefill:
            sequence.values_checked = True
            self._keep_prefix(sequence)
            self._finish(sequence, "scored")

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Keep a computed prompt, whose logits were finite, for those that begin alike."""
        prefixes, key, prompt = self.scheduler.prefixes, sequence.prefix_key, sequence.request.prompt_token_ids
        new = prefixes.insert(key, prompt)
        if not new.blocks:
            return
        try:
            self._runner.save_prefix(sequence, new)
        except BaseException:
            prefixes.discard(key, prompt, new)
            raise

    def _finish(self, sequence: Sequence, reason: FinishReason, error: MHRError | None = None) -> None:
        self._runner.release(sequence)
        self.scheduler.remove(sequence)
        self._events.append(sequence.finish(reason, time.monotonic(), error))

    def _fail(self, sequences: Iterable[Sequence], error: MHRError) -> None:
        for sequence in sequences:
            sequence.values_checked = False
            self._finish(sequence, "error", error)

    def _take_events(self) -> list[Output]:
        events, self._events = self._events, []
        return events


def _not_finite(sequence: Sequence) -> MHRError:
    return AdapterUnavailable(
        f"the model's output for task {sequence.request.task!r} is not finite; its adapter is damaged or diverged in "
        "training: promote another version"
    )
