"""The mix of a step by the compiled operators; `server.adapters.slot_mix` is the same by torch.

Letters: N flattened rows of a step, d_in and d_out of a linear, D the sum of d_out over linears with one input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.adapters.adapted_linear import AddedMix
from server.adapters.mixture_slots import SkillRows
from server.adapters.slot_operator import NO_SLOT, ROWS_AT_ONCE, GroupTables, SlotOperator


class OperatorMix(AddedMix):
    """The mix for flattened rows: `skill_rows` from an inventory's skills, the others from their slots' tables.

    Rows with NO_SLOT are left exactly as the backbone computed them.
    """

    def __init__(
        self,
        operator: SlotOperator,
        linears: Mapping[str, GroupTables],
        groups: Mapping[tuple[str, ...], GroupTables],
        rank: int,
        slots: Sequence[int],
        skill_rows: SkillRows | None = None,
    ) -> None:
        self._operator = operator
        self._linears = linears
        self._groups = groups
        self._skill_rows = skill_rows
        own = slots if skill_rows is None else _without(slots, skill_rows.slots)
        self._slots = torch.tensor(own)
        self._threads = min(torch.get_num_threads(), len(own))
        self._room = torch.empty(self._threads, ROWS_AT_ONCE, rank)

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (1, N, d_out) plus each row's (x A) B, in place where y is contiguous, with x (1, N, d_in); in fp32."""
        y = y.contiguous()
        self._add(self._linears.get(linear), (linear,), x.contiguous(), y)
        return y

    def add_group(self, linears: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        """Add to y (N, D), in place, for linears that read the same input x (N, d_in), their outputs side by side."""
        self._add(self._groups.get(linears), linears, x, y)

    def _add(self, tables: GroupTables | None, linears: tuple[str, ...], x: Tensor, y: Tensor) -> None:
        if self._skill_rows is not None:
            self._skill_rows.add(linears, x, y)
        if tables is not None and len(self._slots):
            self._operator.add_rows(tables, x, y, self._slots, self._room, self._threads)


def _without(slots: Sequence[int], taken: Sequence[int]) -> list[int]:
    """The slots of rows, up to the last that has one, but for the first rows that are `taken`."""
    own = [slot if row >= len(taken) or taken[row] == NO_SLOT else NO_SLOT for row, slot in enumerate(slots)]
    while own and own[-1] == NO_SLOT:
        own.pop()
    return own
