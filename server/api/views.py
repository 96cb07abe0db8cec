"""The wire's models of what goes out."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas import FinishReason, JobStatus


class View(BaseModel):
    """What goes out."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class ErrorBody(View):
    type: str
    message: str
    param: str | None
    code: str


class ErrorAnswer(View):
    error: ErrorBody


class TokenView(View):
    token_id: int
    token: str
    logprob: float


class LogprobView(TokenView):
    top: list[TokenView] = Field(description="The likeliest tokens at this place, likeliest first")


class ScoreView(View):
    text: str
    score: float = Field(description="Mean log-likelihood of the answer's tokens")
    logprob: float = Field(description="Their sum")
    tokens: int


class OutputView(View):
    index: int = Field(description="input number * n + answer number")
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: list[LogprobView] | None = None
    scores: list[ScoreView] | None = Field(
        default=None, description="With `choices`: each answer's score, in the given order"
    )


class UsageView(View):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TimingView(View):
    queue_ms: float
    ttft_ms: float | None
    total_ms: float


class GenerateAnswer(View):
    id: str
    task_id: str
    version: int | None = Field(description="The version that answered; null for `base` and `mu`")
    outputs: list[OutputView]
    usage: UsageView
    timing: TimingView


class JobView(View):
    id: str
    task_id: str
    method: str
    status: JobStatus
    version: int | None = Field(description="The version that the job made")
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


class JobPage(View):
    data: list[JobView]
    next_cursor: str | None


class EventView(View):
    seq: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class EventPage(View):
    data: list[EventView]
    next_cursor: str | None = None


class VersionView(View):
    number: int
    kind: Literal["routing", "adapter", "mu"]
    inventory: str | None
    size_bytes: int
    method: str | None
    job_id: str | None
    metrics: dict[str, Any]
    created_at: datetime


class TaskView(View):
    id: str
    instruction: str
    defaults: dict[str, Any]
    inventory: str | None
    served_version: int | None
    metadata: dict[str, Any]
    created_at: datetime
    updated_at: datetime


class TaskDetail(TaskView):
    versions: list[VersionView]


class TaskPage(View):
    data: list[TaskView]
    next_cursor: str | None


class InventoryView(View):
    name: str
    digest: str
    served: bool = Field(description="Whether `mu` and new tasks use it")
    fits: bool = Field(description="Whether it was made for the served backbone")
    backbone_fingerprint: str
    num_skills: int
    num_heads: int
    rank: int
    alpha: float
    size_bytes: int
    metadata: dict[str, Any]
    created_at: datetime


class InventoryDetail(InventoryView):
    linears: dict[str, list[int]] = Field(description="Each adapted linear's [d_in, d_out], in the routing's order")
    tasks: list[str] = Field(description="The training tasks it brought along")


class InventoryPage(View):
    data: list[InventoryView]
    next_cursor: str | None = None


class Health(View):
    status: str
    reason: str | None = None


class BackboneView(View):
    name: str
    fingerprint: str
    context_length: int
    device: str
    dtype: str


class Info(View):
    version: str
    status: str
    backbone: BackboneView | None
    inventory: str | None
    tasks: int
    settings: dict[str, Any]
