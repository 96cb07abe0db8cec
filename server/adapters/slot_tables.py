"""The tables of all slots: each slot's low-rank pair, linear by linear.

Letters: S slots, r the rank that tables are padded to, d_in and d_out of a linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from server.adapters.slot_operator import GroupTables, LinearTables, describe


@dataclass
class InputGroup:
    """Linears that read the same input, so that one product shrinks it for all of them."""

    linears: tuple[str, ...]
    d_in: int
    A: Tensor | None = None  # (S, len(linears) * r, d_in), allocated on first use


@dataclass
class LinearTable:
    """One linear's part of its group's A, and its own B."""

    group: InputGroup
    place: int  # of this linear in its group
    d_in: int
    d_out: int
    B: Tensor | None = None  # (S, r, d_out) with the scaling folded in, allocated on first use

    def columns(self, rank: int) -> slice:
        """Of the group's low-rank inputs, those of this linear."""
        return slice(self.place * rank, (self.place + 1) * rank)


def make_tables(sizes: Mapping[str, tuple[int, int]], input_groups: Iterable[Sequence[str]]) -> dict[str, LinearTable]:
    """Tables, nothing allocated yet, of linears {name: (d_in, d_out)}; one in no group is a group of its own."""
    tables: dict[str, LinearTable] = {}
    grouped = {linear for group in input_groups for linear in group}
    for linears in (*input_groups, *([linear] for linear in sizes if linear not in grouped)):
        group = InputGroup(tuple(linears), sizes[linears[0]][0])
        for place, linear in enumerate(linears):
            d_in, d_out = sizes[linear]
            assert d_in == group.d_in, f"the linears {linears} cannot read the same input"
            tables[linear] = LinearTable(group, place, d_in, d_out)
    return tables


def describe_linears(tables: Mapping[str, LinearTable], rank: int) -> dict[str, GroupTables]:
    """For the compiled operator: each linear that adapters cover, by itself."""
    covered = {linear: _describe(table, rank, column=0) for linear, table in tables.items() if table.B is not None}
    return {linear: (LinearTables * 1)(described) for linear, described in covered.items()}


def describe_groups(tables: Mapping[str, LinearTable], rank: int) -> dict[tuple[str, ...], GroupTables]:
    """For the compiled operator: those that adapters cover of each group, the outputs of its linears side by side."""
    described: dict[tuple[str, ...], list[LinearTables]] = {}
    for linears in {table.group.linears for table in tables.values()}:
        stops = accumulate(tables[linear].d_out for linear in linears)
        for linear, stop in zip(linears, stops, strict=True):
            table = tables[linear]
            if table.B is not None:
                described.setdefault(linears, []).append(_describe(table, rank, column=stop - table.d_out))
    return {linears: (LinearTables * len(parts))(*parts) for linears, parts in described.items()}


def _describe(table: LinearTable, rank: int, column: int) -> LinearTables:
    assert table.group.A is not None
    assert table.B is not None
    return describe(table.group.A, table.B, table.columns(rank).start, column)
