"""The tensors of one step. Rows are flattened: first one row per decoding sequence, then the prefill chunks.

Letters: N rows of a step, D of them decode rows, S rows whose logits are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.operator_mix import OperatorMix
from server.adapters.slot_mix import Segment, SlotMix
from server.adapters.slots import AdapterSlots
from server.engine.config import Path
from server.engine.merged import MergedMix
from server.engine.paths import choose_path
from server.engine.request import Sequence as RequestState
from server.engine.scheduler import PrefillChunk, StepPlan


@dataclass(frozen=True)
class DecodeRun:
    """Decode sequences in neighbouring cache slots; a step has as few runs as its slots allow."""

    first_slot: int
    start: int  # the run is start … stop-1 in the order of cache slots
    stop: int
    context: int  # tokens of its longest sequence, the new one included
    lengths: Tensor | None  # (stop - start,) tokens of each; None when all are `context`


@dataclass(frozen=True)
class PrefillRows:
    """Rows start … stop-1 of a step: the tokens of one sequence from position `first_position` on."""

    slot: int
    start: int
    stop: int
    first_position: int

    @property
    def context(self) -> int:
        """Tokens of the sequence that are in the cache after the step."""
        return self.first_position + self.stop - self.start


@dataclass(frozen=True)
class AttentionBatch:
    """What the attention function needs of a step."""

    cache_rows: Tensor  # (N,) where each row's key and value go: slot * max_context + position
    num_decode: int  # D
    runs: tuple[DecodeRun, ...]
    to_slot_order: Tensor | None  # (D,) decode rows in the order of cache slots; None when they are
    to_row_order: Tensor | None  # (D,) its inverse
    prefill: tuple[PrefillRows, ...]


@dataclass(frozen=True)
class Batch:
    """One step, made by `build_batch`."""

    token_ids: Tensor  # (1, N)
    positions: Tensor  # (1, N)
    attention: AttentionBatch
    logit_rows: Tensor  # (S,) the sampled sequences' rows, then the scored ones
    sampled: tuple[RequestState, ...]  # the owners of the first logit rows, in their order
    scored: tuple[PrefillChunk, ...]  # chunks with scored tokens; their logit rows follow
    score_targets: tuple[int, ...]  # the tokens scored by them
    path: Path
    mix: SlotMix | OperatorMix | MergedMix | None  # None on the path "bare"


def build_batch(
    plan: StepPlan, slots: AdapterSlots, max_context: int, device: torch.device, merged: MergedMix | None = None
) -> Batch:
    """The tensors of a step, with one transfer to the device for all numbers.

    `merged` is the copy with the one adapter that all sequences have.
    """
    decode = sorted(plan.decode, key=_adapter_order)
    tokens = [s.token_ids[s.num_computed_tokens] for s in decode]
    positions = [s.num_computed_tokens for s in decode]
    cache_rows = [_cache_row(s, s.num_computed_tokens, max_context) for s in decode]
    for chunk in plan.prefill:
        tokens += chunk.sequence.token_ids[chunk.start : chunk.stop]
        positions += range(chunk.start, chunk.stop)
        first = _cache_row(chunk.sequence, chunk.start, max_context)
        cache_rows += range(first, first + chunk.stop - chunk.start)

    adapter_slots = [s.adapter_slot for s in decode if s.adapter_slot is not None]
    skill_rows = slots.skill_rows(adapter_slots)
    path = choose_path(plan.sequences, has_merged=merged is not None, has_skill_rows=skill_rows is not None)

    prefill = _prefill_rows(plan.prefill, len(decode))
    by_slot = sorted(range(len(decode)), key=lambda row: _slot(decode[row]))
    in_order = by_slot == list(range(len(decode)))
    row_order = [] if in_order else sorted(range(len(decode)), key=by_slot.__getitem__)
    sampled = [(s, row) for row, s in enumerate(decode)]
    scored = [(c, rows) for c, rows in zip(plan.prefill, prefill, strict=True) if c.num_scored]
    sampled += [
        (c.sequence, rows.stop - 1)
        for c, rows in zip(plan.prefill, prefill, strict=True)
        if c.completes_prefill and not c.sequence.scoring
    ]
    logit_rows = [row for _, row in sampled]
    for chunk, rows in scored:
        logit_rows += range(rows.stop - chunk.num_scored, rows.stop)

    lengths = [decode[row].num_computed_tokens + 1 for row in by_slot]
    columns = _to_device(
        [tokens, positions, cache_rows, logit_rows, lengths, *([] if in_order else [by_slot, row_order])], device
    )
    return Batch(
        token_ids=columns[0][None],
        positions=columns[1][None],
        attention=AttentionBatch(
            cache_rows=columns[2],
            num_decode=len(decode),
            runs=tuple(_runs([_slot(decode[row]) for row in by_slot], lengths, columns[4])),
            to_slot_order=None if in_order else columns[5],
            to_row_order=None if in_order else columns[6],
            prefill=prefill,
        ),
        logit_rows=columns[3],
        sampled=tuple(s for s, _ in sampled),
        scored=tuple(c for c, _ in scored),
        score_targets=tuple(token for c, _ in scored for token in c.score_targets),
        path=path,
        mix=merged or slots.mix(adapter_slots, _adapter_segments(plan.prefill, prefill), skill_rows),
    )


def _adapter_order(sequence: RequestState) -> tuple[bool, int, int]:
    """Rows of one adapter lie together, in the order of slots; rows without one come last."""
    slot = sequence.adapter_slot
    return slot is None, slot or 0, _slot(sequence)


def _slot(sequence: RequestState) -> int:
    assert sequence.kv_slot is not None, f"request {sequence.request.id} has no cache slot"
    return sequence.kv_slot


def _cache_row(sequence: RequestState, position: int, max_context: int) -> int:
    return _slot(sequence) * max_context + position


def _prefill_rows(chunks: Iterable[PrefillChunk], first_row: int) -> tuple[PrefillRows, ...]:
    rows: list[PrefillRows] = []
    for chunk in chunks:
        stop = first_row + chunk.stop - chunk.start
        rows.append(PrefillRows(_slot(chunk.sequence), first_row, stop, chunk.start))
        first_row = stop
    return tuple(rows)


def _adapter_segments(chunks: Iterable[PrefillChunk], rows: Iterable[PrefillRows]) -> list[Segment]:
    """The chunks' adapters, neighbours with the same one joined."""
    segments: list[Segment] = []
    for chunk, place in zip(chunks, rows, strict=True):
        slot = chunk.sequence.adapter_slot
        if slot is None:
            continue
        if segments and segments[-1].slot == slot and segments[-1].stop == place.start:
            segments[-1] = Segment(slot, segments[-1].start, place.stop)
        else:
            segments.append(Segment(slot, place.start, place.stop))
    return segments


def _runs(slots: Sequence[int], lengths: Sequence[int], lengths_on_device: Tensor) -> Iterable[DecodeRun]:
    """Split sequences, given in the order of their slots, where a slot is left out."""
    start = 0
    for stop in range(1, len(slots) + 1):
        if stop < len(slots) and slots[stop] == slots[stop - 1] + 1:
            continue
        context = max(lengths[start:stop])
        even = context == min(lengths[start:stop])
        yield DecodeRun(slots[start], start, stop, context, None if even else lengths_on_device[start:stop])
        start = stop


def _to_device(columns: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """All columns as int64 tensors, in one transfer."""
    flat = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return list(torch.split(flat.to(device, non_blocking=True), [len(column) for column in columns]))
