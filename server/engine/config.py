"""The engine's settings and what it reports of every step. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from server.errors import InvalidInput

Path = Literal["slots", "inventory", "merged", "bare"]
AdapterPath = Literal["auto", "slots", "inventory", "merged"]
Quantization = Literal["none", "int8"]

_LEAST = {
    "max_batch": 1,
    "max_context": 1,
    "max_queue": 1,
    "prefill_chunk": 1,
    "busy_prefill_chunk": 1,
    "prefix_cache_bytes": 0,
    "adapter_slots": 1,
    "merged_tasks": 0,
    "merge_after_steps": 1,
    "threads": 1,
}


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Raises InvalidInput on an impossible value."""

    max_batch: int = 32  # sequences at once
    max_context: int = 2048  # tokens of one sequence, prompt and answer together
    max_queue: int = 1024  # requests waiting
    prefill_chunk: int = 256  # prompt tokens computed in one step, over all sequences
    busy_prefill_chunk: int | None = 20  # while most sequences decode, before what the scheduler adds; None: no less
    prefix_cache_bytes: int = 512 * 2**20  # for prompt prefixes that were computed before; 0 keeps none
    adapter_slots: int | None = None  # resident adapters; None: one per sequence
    # Tasks with a merged copy of the weights; None: one, if that takes at most 1 GiB. int8 has none.
    merged_tasks: int | None = None
    merge_after_steps: int = 32  # consecutive steps that a task must have had the batch to itself
    # For tests and benchmarks: "slots" takes no other way, "inventory" takes that one for a single row already, where
    # processor and inventory allow it, and "merged" waits for the copy at a task's first step alone.
    adapter_path: AdapterPath = "auto"
    threads: int | None = None  # of the computation on CPU; None: torch's own choice
    quantization: Quantization = "none"  # of the model's linears and its head, on CPU
    # On CPU in fp32, int8 included: use the compiled operators where they were built, else what torch has.
    operators: bool = True
    packed_head: bool = True  # on CPU in fp32, not quantised: keep the head in the processor's own layout too

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidInput(f"{name} is {value}; it must be at least {least}", param=name)
        if self.num_adapter_slots < self.max_batch:
            raise InvalidInput(
                f"adapter_slots = {self.adapter_slots} is less than max_batch = {self.max_batch}: every sequence of "
                "a batch may bring its own adapter",
                param="adapter_slots",
            )
        if self.quantization == "int8" and (self.merged_tasks or self.adapter_path == "merged"):
            raise InvalidInput(
                "int8 weights are not merged, since an answer would then depend on who else is in the batch; leave "
                "merged_tasks and adapter_path alone",
                param="merged_tasks",
            )

    @property
    def num_adapter_slots(self) -> int:
        return self.max_batch if self.adapter_slots is None else self.adapter_slots


@dataclass(frozen=True)
class StepStats:
    """One engine step, for metrics and logs."""

    path: Path  # how the adapted linears were computed
    decode_rows: int  # sequences that got one more token computed
    prefill_tokens: int  # prompt tokens that were computed
    reused_tokens: int  # prompt tokens of the sequences that began, taken from the prefix cache
    generated_tokens: int
    distinct_tasks: int
    seconds: float

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_tokens
