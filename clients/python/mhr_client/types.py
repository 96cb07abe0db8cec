"""What goes in and what comes back, as typed dictionaries and frozen dataclasses. Times are in UTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Literal, TypedDict, TypeVar

T = TypeVar("T")

Method = Literal["mhr", "mhr-z", "mhr-mu", "poly", "poly-z", "poly-mu", "lora"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED = frozenset({"succeeded", "failed", "cancelled"})

# (input, output) or {"input": …, "output": …}; an output may be several answers that all count as right.
Example = tuple[str, str | Sequence[str]] | Mapping[str, Any]


class Defaults(TypedDict, total=False):
    """Generation parameters that a task may set as its defaults."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    repetition_penalty: float
    ignore_eos: bool


class Parameters(Defaults, total=False):
    """Generation parameters of one request; the server's documentation tells what each does."""

    n: int
    logprobs: int
    choices: Sequence[str]


class AdaptOptions(TypedDict, total=False):
    """What `adapt` takes besides the task and its examples.

    `validation` is {"fraction": …} or {"examples": […]}; `idempotency_key` makes a repeated call return the
    first call's job.
    """

    instruction: str
    method: Method
    inventory: str
    hyperparameters: Mapping[str, Any]
    validation: Mapping[str, Any]
    promote: Literal["if_better", "always", "never"]
    seed: int
    metadata: Mapping[str, Any]
    idempotency_key: str


class TaskChange(TypedDict, total=False):
    """What `update_task` changes; what is left out stays as it is."""

    instruction: str
    defaults: Defaults
    metadata: Mapping[str, Any]


class TaskOptions(TaskChange, total=False):
    """What `put_task` takes besides the id; `routing` holds the logits [linear][head][skill] of kind `routing`."""

    inventory: str
    kind: Literal["mu", "routing"]
    routing: Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class TokenLogprob:
    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True)
class Logprob:
    """The chosen token's log-probability, and the likeliest tokens at its place."""

    token_id: int
    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Score:
    """One of the given choices: `score` is the mean log-likelihood of its tokens, `logprob` their sum."""

    text: str
    score: float
    logprob: float
    tokens: int


@dataclass(frozen=True)
class Output:
    """One answer; `index` is input number * n + answer number."""

    index: int
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[Logprob, ...] | None = None
    scores: tuple[Score, ...] | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds: waiting for a place in the batch, until the first token, and altogether."""

    queue_ms: float
    ttft_ms: float | None
    total_ms: float


@dataclass(frozen=True)
class Generation:
    """The whole answer to one request; `version` is None for `base` and `mu`."""

    id: str
    task_id: str
    version: int | None
    outputs: tuple[Output, ...]
    usage: Usage
    timing: Timing

    @property
    def texts(self) -> list[str]:
        """The answers' texts, in the order of their index."""
        return [output.text for output in self.outputs]

    @property
    def text(self) -> str:
        """The text of the only answer. Raises ValueError where there are several."""
        if len(self.outputs) != 1:
            raise ValueError(f"there are {len(self.outputs)} answers; use `texts`")
        return self.outputs[0].text


@dataclass(frozen=True)
class Token:
    """A piece of text as it comes; `index` tells which output it belongs to."""

    index: int
    text: str


@dataclass(frozen=True)
class JobInfo:
    """A job at one moment; `version` is the version that it made."""

    id: str
    task_id: str
    method: str
    status: JobStatus
    version: int | None
    progress: dict[str, Any]
    metrics: dict[str, Any]
    error: str | None
    attempts: int
    cancel_requested: bool
    inventory: str | None
    promote: str
    num_examples: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @property
    def finished(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status in FINISHED


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job; `seq` counts from 1."""

    seq: int
    type: str
    data: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class Version:
    number: int
    kind: str
    inventory: str | None
    size_bytes: int
    method: str | None
    job_id: str | None
    metrics: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class Task:
    """A task; `versions` is filled where one task was asked for, and None in lists."""

    id: str
    instruction: str
    defaults: dict[str, Any]
    inventory: str | None
    served_version: int | None
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    versions: tuple[Version, ...] | None = None


@dataclass(frozen=True)
class Inventory:
    """An inventory; `linears` ([d_in, d_out] each) and `tasks` are filled where one inventory was asked for."""

    name: str
    digest: str
    served: bool
    fits: bool
    backbone_fingerprint: str
    num_skills: int
    num_heads: int
    rank: int
    alpha: float
    size_bytes: int
    metadata: dict[str, Any]
    created_at: datetime
    linears: dict[str, Any] | None = None
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Backbone:
    name: str
    fingerprint: str
    context_length: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Info:
    version: str
    status: str
    backbone: Backbone | None
    inventory: str | None
    tasks: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; pass `next_cursor` as `cursor` to get the next, None after the last."""

    data: tuple[T, ...]
    next_cursor: str | None
