"""Which tokens the next step computes: continuous batching, fair between tasks, prompts in chunks and without the
prefixes that are kept. No torch here."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.config import EngineConfig
from server.engine.kv_cache import SlotPool
from server.engine.prefix_cache import BLOCK_TOKENS, PrefixCache, shared_length
from server.engine.request import Sequence, Status
from server.errors import Unavailable

# A sequence waits for another's prefix while what is left of the other is at most so many times what it would save.
_PATIENCE = 2
# Prompt tokens of a step beside sequences that decode: more for each of them, since the step is longer anyway, and for
# each further prompt, since more are waiting.
_MORE_PER_DECODE = 1
_MORE_PER_PROMPT = 12
# A prompt's token attends to those before it. Behind so many of them that takes as long as all the rest of it.
_DOUBLE_DEPTH = 500


class QueueFull(Unavailable):
    """The waiting queue is full; the caller may try again after `retry_after_s`."""

    def __init__(self, max_queue: int) -> None:
        super().__init__(
            f"the queue is full: {max_queue} requests wait already; try again in a few seconds",
            retry_after_s=2,
            code="queue_full",
        )


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens start … stop-1 of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def begins_prefill(self) -> bool:
        return self.start == self.sequence.prefix.num_tokens

    @property
    def completes_prefill(self) -> bool:
        return self.stop == self.sequence.num_prefill_tokens

    @property
    def score_targets(self) -> list[int]:
        """The tokens to score whose predecessors this chunk computes."""
        if not self.sequence.scoring:
            return []
        return self.sequence.token_ids[max(self.start + 1, self.sequence.num_prompt_tokens) : self.stop + 1]

    @property
    def num_scored(self) -> int:
        return len(self.score_targets)


@dataclass(frozen=True)
class StepPlan:
    """The work of one step."""

    decode: tuple[Sequence, ...]  # one token each
    prefill: tuple[PrefillChunk, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return (*self.decode, *(chunk.sequence for chunk in self.prefill))

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.prefill)

    @property
    def num_reused_tokens(self) -> int:
        return sum(chunk.start for chunk in self.prefill if chunk.begins_prefill)

    def without_finished(self) -> StepPlan:
        """The plan without sequences that finished since it was made."""
        alive = [s for s in self.sequences if s.status is not Status.FINISHED]
        if len(alive) == len(self.sequences):
            return self
        return StepPlan(
            decode=tuple(s for s in self.decode if s in alive),
            prefill=tuple(chunk for chunk in self.prefill if chunk.sequence in alive),
        )


class Scheduler:
    """Owns every sequence from arrival to finish.

    Tasks take turns in leaving the queue, so that one busy task cannot starve the others. Every running sequence
    decodes in every step; prompts share a budget of tokens a step, small while most sequences decode. A prompt begins
    behind what the prefix cache holds of it, and waits for another one that is about to fill that in.
    """

    def __init__(self, config: EngineConfig, num_prefix_blocks: int = 0) -> None:
        self._config = config
        self._waiting: dict[str, deque[Sequence]] = {}  # by task; the order of the keys is the tasks' turn
        self._num_waiting = 0
        self._active: dict[str, Sequence] = {}  # prefilling and running, by request id, in order of admission
        self._open: dict[str, Sequence] = {}  # all of them, by request id
        self.kv_slots = SlotPool(config.max_batch)
        self.prefixes = PrefixCache(num_prefix_blocks)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def has_work(self) -> bool:
        return bool(self._num_waiting or self._active)

    def check_room(self, more: int = 0) -> None:
        """Raise QueueFull when the queue, with `more` others on their way to it, has no room for one request."""
        if self._num_waiting + more >= self._config.max_queue:
            raise QueueFull(self._config.max_queue)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull."""
        self.check_room()
        self._waiting.setdefault(sequence.request.task, deque()).append(sequence)
        self._num_waiting += 1
        self._open[sequence.request.id] = sequence

    def schedule(self) -> StepPlan:
        """Admit what fits and choose the tokens of the next step."""
        self._admit()
        decode = tuple(s for s in self._active.values() if s.status is Status.RUNNING)
        prefilling = [s for s in self._active.values() if s.status is Status.PREFILLING]
        budget = self._prefill_budget(len(decode), prefilling)
        return StepPlan(decode, tuple(self._share_budget(self._ready(prefilling), budget)))

    def advance(self, plan: StepPlan) -> None:
        """Count the plan's tokens as computed."""
        for sequence in plan.decode:
            sequence.num_computed_tokens += 1
        for chunk in plan.prefill:
            chunk.sequence.num_computed_tokens = chunk.stop
            if chunk.completes_prefill:
                chunk.sequence.status = Status.RUNNING

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or active, and free its slot."""
        del self._open[sequence.request.id]
        if self._active.pop(sequence.request.id, None) is not None:
            assert sequence.kv_slot is not None
            self.kv_slots.free(sequence.kv_slot)
            sequence.kv_slot = None
            return
        task = sequence.request.task
        self._waiting[task].remove(sequence)
        self._num_waiting -= 1
        if not self._waiting[task]:
            del self._waiting[task]

    def find(self, request_id: str) -> Sequence | None:
        """The sequence of a request that has not finished."""
        return self._open.get(request_id)

    def all_sequences(self) -> list[Sequence]:
        """Every sequence that has not finished."""
        return list(self._open.values())

    def check_integrity(self) -> None:
        """Assert that slots, statuses and counts agree with each other."""
        self.kv_slots.check_integrity()
        self.prefixes.check_integrity()
        slots = [s.kv_slot for s in self._active.values()]
        assert len(set(slots)) == len(slots) == self.kv_slots.num_used, "active sequences and used slots differ"
        assert all(s.status in (Status.PREFILLING, Status.RUNNING) for s in self._active.values())
        assert all(self._waiting.values()), "a task without waiting sequences has a turn"
        assert self._num_waiting == sum(map(len, self._waiting.values())), "the waiting sequences are miscounted"
        assert len(self._open) == self._num_waiting + len(self._active), "a sequence was lost or kept too long"

    def _admit(self) -> None:
        while self._waiting and self.kv_slots.can_allocate:
            sequence = self._next_waiting()
            sequence.kv_slot = self.kv_slots.allocate()
            sequence.status = Status.PREFILLING
            sequence.first_scheduled_s = time.monotonic()
            self._active[sequence.request.id] = sequence

    def _next_waiting(self) -> Sequence:
        """The oldest sequence of the task whose turn it is; that task's next turn comes last."""
        task = next(iter(self._waiting))
        queue = self._waiting.pop(task)
        sequence = queue.popleft()
        if queue:
            self._waiting[task] = queue
        self._num_waiting -= 1
        return sequence

    def _prefill_budget(self, num_decode: int, prefilling: list[Sequence]) -> int:
        """Prompt tokens of the next step. A step takes longer with each, the more so the more tokens it attends to, and
        all who decode wait for it; so they are few, unless more wait for their first token than for their next."""
        config = self._config
        if config.busy_prefill_chunk is None or not prefilling or len(prefilling) > num_decode:
            return config.prefill_chunk
        more = _MORE_PER_DECODE * num_decode + _MORE_PER_PROMPT * (len(prefilling) - 1)
        depth = sum(s.num_computed_tokens for s in prefilling) / len(prefilling)
        tokens = (config.busy_prefill_chunk + more) / (1 + depth / _DOUBLE_DEPTH)
        return min(config.prefill_chunk, max(1, round(tokens)))

    def _ready(self, prefilling: list[Sequence]) -> list[Sequence]:
        """The sequences that should compute now; those that have not begun know then what they need not compute."""
        ready: list[Sequence] = []
        for sequence in prefilling:
            if not _has_begun(sequence):
                # The last prompt token is always computed: its logits choose the first new token.
                sequence.prefix = self.prefixes.match(
                    sequence.prefix_key, sequence.request.prompt_token_ids, sequence.num_prompt_tokens - 1
                )
                sequence.num_computed_tokens = sequence.prefix.num_tokens
                if any(self._should_await(sequence, other) for other in ready):
                    continue
            ready.append(sequence)
        return ready

    def _should_await(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether `other` computes now what `sequence` would, and will be done before that has taken too long."""
        if sequence.prefix_key != other.prefix_key:
            return False
        shared = shared_length(sequence.request.prompt_token_ids, other.request.prompt_token_ids)
        gain = shared - sequence.prefix.num_tokens
        return gain >= BLOCK_TOKENS and _left(other) <= _PATIENCE * gain and self.prefixes.can_keep(shared)

    def _share_budget(self, prefilling: list[Sequence], budget: int) -> Iterable[PrefillChunk]:
        """Half of the budget belongs to the oldest, the rest goes to whoever has least left to compute.

        So short prompts pass a long one, and the long one still moves on in every step.
        """
        if not prefilling:
            return
        oldest, *others = prefilling
        grants = {oldest.request.id: min(_left(oldest), max(1, budget // 2))}
        budget -= grants[oldest.request.id]
        for sequence in sorted(others, key=_left):
            grants[sequence.request.id] = min(_left(sequence), budget)
            budget -= grants[sequence.request.id]
        grants[oldest.request.id] += min(_left(oldest) - grants[oldest.request.id], budget)
        for sequence in prefilling:
            if grant := grants[sequence.request.id]:
                start = sequence.num_computed_tokens
                if start and not _has_begun(sequence):
                    self.prefixes.use(sequence.prefix_key, sequence.token_ids, sequence.prefix)
                yield PrefillChunk(sequence, start, start + grant)


def _has_begun(sequence: Sequence) -> bool:
    return sequence.num_computed_tokens > sequence.prefix.num_tokens


def _left(sequence: Sequence) -> int:
    return sequence.num_prefill_tokens - sequence.num_computed_tokens
