"""What goes into the engine and what comes out of it, and the state of one request inside. No torch here."""

from __future__ import annotations

import enum
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from server.engine.prefix_cache import PrefixHit
from server.errors import InvalidInput, MHRError

if TYPE_CHECKING:
    from server.adapters.assembly import Adapter

MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "scored", "abort", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Raises InvalidInput, naming the field, on an impossible value.

    `logprobs` None hands out no log-probabilities, 0 those of the chosen tokens, n > 0 also the n likeliest
    alternatives at every place. They are those of the model itself, before penalties and temperature.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"between 0 and max_new_tokens = {self.max_new_tokens}",
        )
        _check(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or a positive number")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _check(
            0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "a positive number"
        )
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"between 0 and {MAX_LOGPROBS}",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class AdapterHandle:
    """An adapter and the key that identifies its content; requests with the same key share one slot."""

    key: str
    adapter: Adapter


@dataclass(frozen=True)
class EngineRequest:
    """One prompt to continue, or to score.

    `task` is what fairness is counted by. With `score_token_ids` nothing is generated: the log-probability of
    each of these tokens after the prompt comes back in `FinishOutput.token_logprobs`, and `sampling` has no part.

    Raises InvalidInput when the prompt or the tokens to score are empty.
    """

    id: str
    task: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: AdapterHandle | None = None  # None is the bare backbone
    score_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise InvalidInput("the prompt has no tokens; send at least one", param="prompt_token_ids")
        if self.score_token_ids is not None and not self.score_token_ids:
            raise InvalidInput("there are no tokens to score; send at least one", param="score_token_ids")


@dataclass(frozen=True)
class TokenLogprob:
    """One likely token at a place, and its log-probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenOutput:
    """One generated token, handed out as soon as it is chosen; an end-of-text token is handed out too."""

    request_id: str
    token_id: int
    logprob: float | None = None  # when the request asked for logprobs
    top_logprobs: tuple[TokenLogprob, ...] = ()  # likeliest first


@dataclass(frozen=True)
class RequestTiming:
    """Seconds since the request arrived; None for what never happened."""

    queue_s: float | None  # until it was first scheduled
    first_token_s: float | None
    total_s: float


@dataclass(frozen=True)
class FinishOutput:
    """The one last event of every accepted request.

    reason: "stop" an end-of-text token, "length" max_new_tokens or the context's end, "scored" all
    `score_token_ids` scored, "abort" aborted or the engine stopped, "error" see `error`.
    """

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int  # with the end-of-text token; 0 for scoring
    timing: RequestTiming
    token_logprobs: tuple[float, ...] = ()  # of score_token_ids, in their order
    error: MHRError | None = None


Output = TokenOutput | FinishOutput


class Status(enum.Enum):
    """Where a sequence stands: WAITING → PREFILLING → RUNNING → FINISHED."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False)
class Sequence:
    """The mutable state of one request in the engine.

    `num_computed_tokens` counts the tokens whose keys and values are in the cache. A running sequence's last
    token is sampled but not yet computed.
    """

    request: EngineRequest
    arrival_s: float  # time.monotonic()
    status: Status = Status.WAITING
    token_ids: list[int] = field(default_factory=list)  # prompt, then the generated or the scored tokens
    num_computed_tokens: int = 0
    prefix: PrefixHit = field(default_factory=PrefixHit)  # what it began with instead of computing it
    kv_slot: int | None = None
    adapter_slot: int | None = None
    values_checked: bool = False  # the logits of its last computed token were finite, so its cached values are
    token_logprobs: list[float] = field(default_factory=list)  # of scored tokens
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    random: random.Random = field(init=False)  # this sequence's own, so that its draws do not depend on the batch

    def __post_init__(self) -> None:
        self.token_ids = [*self.request.prompt_token_ids, *(self.request.score_token_ids or ())]
        self.random = random.Random(self.request.sampling.seed)

    @property
    def scoring(self) -> bool:
        return self.request.score_token_ids is not None

    @property
    def prefix_key(self) -> str | None:
        """Sequences with the same one may share a prefix."""
        return None if self.request.adapter is None else self.request.adapter.key

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        return 0 if self.scoring else len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that must be computed before the first token comes out; nothing follows a last scored token."""
        return len(self.token_ids) - 1 if self.scoring else self.num_prompt_tokens

    def finish(self, reason: FinishReason, now_s: float, error: MHRError | None = None) -> FinishOutput:
        """Mark the sequence finished and make its last event."""
        assert self.status is not Status.FINISHED, f"request {self.request.id} finished twice"
        self.status = Status.FINISHED
        return FinishOutput(
            request_id=self.request.id,
            reason=reason,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_generated_tokens,
            timing=RequestTiming(
                queue_s=_since(self.arrival_s, self.first_scheduled_s),
                first_token_s=_since(self.arrival_s, self.first_token_s),
                total_s=now_s - self.arrival_s,
            ),
            token_logprobs=tuple(self.token_logprobs) if reason == "scored" else (),
            error=error,
        )


def _since(start_s: float, then_s: float | None) -> float | None:
    return None if then_s is None else then_s - start_s


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidInput(f"{name} is {value}; it must be {allowed}", param=name)
