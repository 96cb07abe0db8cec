"""The mix of a step whose rows have their adapters in slots, by torch.

It is the reference of the compiled operator, which multiplies every row with its own adapter and reads the tables where
they lie. Torch has two ways: it gathers the tables of one-token rows first, and computes prompts, as segments of rows
with one adapter, by plain products.

Letters: S slots, N flattened rows of a step, d_in and d_out of a linear, r the rank that tables are padded to,
R = r times the linears that share an input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.adapted_linear import AddedMix
from server.adapters.slot_operator import NO_SLOT
from server.adapters.slot_tables import InputGroup, LinearTable


@dataclass(frozen=True)
class Segment:
    """Rows start … stop-1 of a step, all of the adapter in `slot`."""

    slot: int
    start: int
    stop: int


def slots_of_rows(decode_slots: Sequence[int], segments: Sequence[Segment]) -> list[int]:
    """The slot of every row of a step, up to the last that has one; NO_SLOT between."""
    slots = list(decode_slots)
    for segment in segments:
        slots += [NO_SLOT] * (segment.start - len(slots))
        slots += [segment.slot] * (segment.stop - segment.start)
    return slots


class TorchRows:
    """One-token rows by torch: grouped by slot, group g's at g * height … of a padded (groups * height) block."""

    def __init__(self, rank: int, slots: Sequence[int], device: torch.device) -> None:
        groups: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            groups.setdefault(slot, []).append(row)
        low, high = slots[0], slots[-1] + 1
        assert list(groups) == sorted(groups), "decode rows are not in ascending order of their slots"
        self._rank = rank
        self._count = len(slots)
        self._groups = len(groups)
        self._height = max(map(len, groups.values()))  # rows of the largest group
        # The groups' slots: a range, or (groups,)
        self._slots = slice(low, high) if high - low == len(groups) else torch.tensor(list(groups), device=device)
        # Which row each padded place reads, and the padded place of each row; None when rows lie like that already.
        self._source: Tensor | None = None  # (groups * height,)
        self._places: Tensor | None = None  # (rows,)
        if len(slots) < len(groups) * self._height:
            self._pad(list(groups.values()), device)

    def add(self, table: LinearTable, x: Tensor, y: Tensor, hidden: Tensor | None) -> Tensor:
        """Add (x A) B to these rows of y (1, N, d_out), in place, with x (1, N, d_in).

        `hidden` (groups, height, R), the rows' low-rank inputs, is what this returned for another linear of the same
        group and input.
        """
        assert table.group.A is not None
        assert table.B is not None
        if hidden is None:
            hidden = torch.bmm(self._block(x[0]), self._pick(table.group.A, x.dtype).transpose(1, 2))
        h, B, y = hidden[:, :, table.columns(self._rank)], self._pick(table.B, y.dtype), y[0]
        if self._places is None:
            y[: self._count].view(self._groups, self._height, -1).baddbmm_(h, B)
        else:
            y[: self._count] += torch.bmm(h, B).view(-1, y.shape[1]).index_select(0, self._places)
        return hidden

    def _pad(self, rows_of: list[list[int]], device: torch.device) -> None:
        source = [rows[min(place, len(rows) - 1)] for rows in rows_of for place in range(self._height)]
        places = [group * self._height + place for group, rows in enumerate(rows_of) for place in range(len(rows))]
        index = torch.tensor([*source, *places], device=device)
        self._source, self._places = index[: len(source)], index[len(source) :]

    def _block(self, x: Tensor) -> Tensor:
        """x (N, d) -> (groups, height, d)."""
        block = x[: self._count] if self._source is None else x.index_select(0, self._source)
        return block.view(self._groups, self._height, -1)

    def _pick(self, table: Tensor, dtype: torch.dtype) -> Tensor:
        """The groups' part (groups, …) of a table (S, …)."""
        picked = table[self._slots] if isinstance(self._slots, slice) else table.index_select(0, self._slots)
        return picked.to(dtype)


class SlotMix(AddedMix):
    """The mix over slots for flattened rows (1, N, d): rows with an adapter each first, then whole segments.

    Rows that belong to neither are left exactly as the backbone computed them.
    """

    def __init__(
        self,
        tables: Mapping[str, LinearTable],
        rank: int,
        rows: TorchRows | None,
        segments: tuple[Segment, ...] = (),
    ) -> None:
        self._tables = tables
        self._rank = rank
        self._rows = rows
        self._segments = segments
        self._x: Tensor | None = None  # the input, and the group, that the hidden parts below belong to
        self._group: InputGroup | None = None
        self._of_rows: Tensor | None = None
        self._of_segments: list[Tensor] = []  # (rows, R) per segment

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (1, N, d_out) plus each row's (x A) B, in place where y is contiguous, with x (1, N, d_in)."""
        table = self._tables[linear]
        if table.B is None:
            return y
        y = y.contiguous()
        if self._x is not x or self._group is not table.group:  # a group's linears follow each other on one tensor
            self._x, self._group, self._of_rows = x, table.group, None
            self._of_segments = self._shrink_segments(table.group, x[0]) if self._segments else []
        if self._rows is not None:
            self._of_rows = self._rows.add(table, x, y, self._of_rows)
        if self._segments:
            self._expand_segments(table, y[0])
        return y

    def _shrink_segments(self, group: InputGroup, x: Tensor) -> list[Tensor]:
        """x (N, d_in) -> the low-rank inputs of all linears of the group."""
        assert group.A is not None
        return [x[s.start : s.stop] @ group.A[s.slot].to(x.dtype).T for s in self._segments]

    def _expand_segments(self, table: LinearTable, y: Tensor) -> None:
        """Add to y (N, d_out)."""
        assert table.B is not None
        columns = table.columns(self._rank)
        for segment, h in zip(self._segments, self._of_segments, strict=True):
            y[segment.start : segment.stop].addmm_(h[:, columns], table.B[segment.slot].to(y.dtype))
