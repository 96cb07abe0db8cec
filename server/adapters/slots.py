"""Resident adapters of the sequences in a batch, and the mix that computes a step over them.

Letters: S slots, N flattened rows of a step, d_in and d_out of a linear, r the largest rank seen.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.adapted_linear import AddedMix
from server.adapters.assembly import Adapter
from server.errors import AdapterUnavailable
from server.memory import lazy_zeros


@dataclass
class _InputGroup:
    """Linears that read the same input, so that one product shrinks it for all of them."""

    linears: tuple[str, ...]
    d_in: int
    A: Tensor | None = None  # (S, len(linears) * r, d_in), allocated on first use


@dataclass
class _LinearTable:
    group: _InputGroup
    place: int  # of this linear in its group
    d_in: int
    d_out: int
    B: Tensor | None = None  # (S, r, d_out) with the scaling folded in, allocated on first use


@dataclass(frozen=True)
class Segment:
    """Rows start … stop-1 of a step, all of the adapter in `slot`."""

    slot: int
    start: int
    stop: int


class AdapterSlots:
    """A fixed number of slots, each holding one adapter by key; shared, reference-counted, least recently used out.

    `linear_sizes` is {name: (d_in, d_out)}; `input_groups` names linears that read the same input tensor.
    """

    def __init__(
        self,
        linear_sizes: Mapping[str, tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        input_groups: Iterable[Sequence[str]] = (),
    ) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = torch.device(device)
        self.rank = 0  # the largest seen; every table is padded to it
        self._tables = _make_tables(linear_sizes, input_groups)
        self._empty = list(range(num_slots))  # a heap of slots that hold nothing
        self._slot_of: dict[str, int] = {}
        self._references: dict[str, int] = {}  # keys in use
        self._idle: OrderedDict[str, None] = OrderedDict()  # resident keys not in use, least recently used first

    def can_acquire(self, key: str) -> bool:
        """Whether `acquire` has a slot for this key."""
        return key in self._slot_of or bool(self._empty or self._idle)

    def acquire(self, key: str, adapter: Adapter) -> int:
        """The slot that holds the adapter, loaded if need be, and one more reference to it.

        Ask `can_acquire` first. Raises AdapterUnavailable when the adapter does not fit the model.
        """
        if key in self._slot_of:
            self._idle.pop(key, None)
        else:
            self._check_fits(key, adapter)
            self._slot_of[key] = slot = self._take_slot()
            self._load(slot, adapter)
        self._references[key] = self._references.get(key, 0) + 1
        return self._slot_of[key]

    def release(self, key: str) -> None:
        """Give one reference back; the adapter stays resident until its slot is needed."""
        self._references[key] -= 1
        if self._references[key] == 0:
            del self._references[key]
            self._idle[key] = None

    def mix(self, decode_slots: Sequence[int], segments: Sequence[Segment]) -> SlotMix | None:
        """The mix of a step whose first rows are one-token rows of these slots, in ascending order, and whose
        segments lie behind them; all other rows have no adapter. None when no row has one.
        """
        if not decode_slots and not segments:
            return None
        decode = _group_rows(decode_slots, self.device) if decode_slots else None
        return SlotMix(self._tables, self.rank, decode, tuple(segments))

    def check_integrity(self) -> None:
        """Assert that every slot is empty, idle or referenced, and only one of these."""
        used = list(self._slot_of.values())
        assert sorted([*self._empty, *used]) == list(range(self.num_slots)), "adapter slots were lost or invented"
        assert self._references.keys() | self._idle.keys() == self._slot_of.keys(), "a resident adapter is unaccounted"
        assert not self._references.keys() & self._idle.keys(), "an adapter in use counts as idle"
        assert all(count > 0 for count in self._references.values()), "an adapter has no references but is in use"

    def _take_slot(self) -> int:
        if self._empty:
            return heapq.heappop(self._empty)
        assert self._idle, "no adapter slot is free"
        key, _ = self._idle.popitem(last=False)
        return self._slot_of.pop(key)

    def _check_fits(self, key: str, adapter: Adapter) -> None:
        for linear, weights in adapter.weights.items():
            table = self._tables.get(linear)
            if table is None:
                raise AdapterUnavailable(f"adapter {key}: the backbone has no linear named {linear!r}")
            sizes = (weights.A.shape[0], weights.B.shape[1])
            if sizes != (table.d_in, table.d_out):
                raise AdapterUnavailable(
                    f"adapter {key}: linear {linear!r} has sizes {sizes}, the backbone's are {table.d_in, table.d_out}"
                )

    def _load(self, slot: int, adapter: Adapter) -> None:
        """Copy the adapter into the slot; what it does not cover becomes zero."""
        if adapter.rank > self.rank:
            self._widen(adapter.rank)
        for linear in adapter.weights:
            self._allocate(self._tables[linear])
        for linear, table in self._tables.items():
            if table.B is None:
                continue
            A, B = _rows_of(table, slot, self.rank), table.B[slot]  # (r, d_in), (r, d_out)
            weights = adapter.weights.get(linear)
            rank = 0 if weights is None else weights.A.shape[1]
            A[rank:].zero_()
            B[rank:].zero_()
            if weights is not None:
                A[:rank].copy_(weights.A.T)
                torch.mul(weights.B.to(B), adapter.scaling, out=B[:rank])

    def _allocate(self, table: _LinearTable) -> None:
        group = table.group
        if group.A is None:
            group.A = self._zeros(len(group.linears) * self.rank, group.d_in)
        if table.B is None:
            table.B = self._zeros(self.rank, table.d_out)

    def _widen(self, rank: int) -> None:
        """Pad all tables to a larger rank."""
        old, self.rank = self.rank, rank
        for group in {id(table.group): table.group for table in self._tables.values()}.values():
            if group.A is not None:
                narrow = group.A.view(self.num_slots, len(group.linears), old, group.d_in)
                group.A = self._zeros(len(group.linears) * rank, group.d_in)
                group.A.view(self.num_slots, len(group.linears), rank, group.d_in)[:, :, :old] = narrow
        for table in self._tables.values():
            if table.B is not None:
                narrow, table.B = table.B, self._zeros(rank, table.d_out)
                table.B[:, :old] = narrow

    def _zeros(self, *shape: int) -> Tensor:
        return lazy_zeros((self.num_slots, *shape), self.dtype, self.device)


@dataclass(frozen=True)
class DecodeRows:
    """One-token rows grouped by slot: group g's rows lie at g * height … of a padded (groups * height) block.

    The index tensors are None when the rows lie in that order already, without padding.
    """

    slots: slice | Tensor  # the groups' slots: a range, or (groups,)
    groups: int
    height: int  # rows of the largest group
    count: int  # rows with an adapter; they come first
    source: Tensor | None  # (groups * height,) which row each padded place reads
    places: Tensor | None  # (count,) the padded place of each row

    def pick(self, table: Tensor) -> Tensor:
        """The groups' part (groups, …) of a table (S, …)."""
        return table[self.slots] if isinstance(self.slots, slice) else table.index_select(0, self.slots)


class SlotMix(AddedMix):
    """The mix over slots for flattened rows (1, N, d): decode rows first, then whole segments.

    Rows that belong to neither are left exactly as the backbone computed them.
    """

    def __init__(
        self,
        tables: Mapping[str, _LinearTable],
        rank: int,
        decode: DecodeRows | None,
        segments: tuple[Segment, ...],
    ) -> None:
        self._tables = tables
        self._rank = rank
        self._decode = decode
        self._segments = segments
        self._x: Tensor | None = None  # the input, and the group, that the hidden parts below belong to
        self._group: _InputGroup | None = None
        self._hidden: list[Tensor] = []  # decode (groups, height, R), then (rows, R) per segment

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y (1, N, d_out) plus each row's (x A) B, in place, with x (1, N, d_in)."""
        table = self._tables[linear]
        if table.B is None:
            return y
        if self._x is not x or self._group is not table.group:  # a group's linears follow each other on one tensor
            self._hidden = self._shrink(table.group, x[0])
            self._x, self._group = x, table.group
        start = table.place * self._rank
        self._expand(table.B, start, y[0])
        return y

    def _shrink(self, group: _InputGroup, x: Tensor) -> list[Tensor]:
        """x (N, d_in) -> the low-rank inputs of all linears of the group."""
        assert group.A is not None
        hidden: list[Tensor] = []
        rows = self._decode
        if rows is not None:
            block = x[: rows.count] if rows.source is None else x.index_select(0, rows.source)
            block = block.view(rows.groups, rows.height, -1)
            hidden.append(torch.bmm(block, rows.pick(group.A).transpose(1, 2)))
        hidden.extend(x[s.start : s.stop] @ group.A[s.slot].T for s in self._segments)
        return hidden

    def _expand(self, B: Tensor, start: int, y: Tensor) -> None:
        """Add to y (N, d_out) what the hidden columns from `start` make with B (S, r, d_out)."""
        columns = slice(start, start + self._rank)
        hidden = iter(self._hidden)
        rows = self._decode
        if rows is not None:
            h = next(hidden)[:, :, columns]
            if rows.places is None:
                y[: rows.count].view(rows.groups, rows.height, -1).baddbmm_(h, rows.pick(B))
            else:
                delta = torch.bmm(h, rows.pick(B)).view(-1, y.shape[1])
                y[: rows.count] += delta.index_select(0, rows.places)
        for segment, h in zip(self._segments, hidden, strict=True):
            y[segment.start : segment.stop].addmm_(h[:, columns], B[segment.slot])


def _group_rows(slots: Sequence[int], device: torch.device) -> DecodeRows:
    """Group rows, given in ascending order of their slots."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        groups.setdefault(slot, []).append(row)
    height = max(map(len, groups.values()))
    low, high = slots[0], slots[-1] + 1
    assert list(groups) == sorted(groups), "decode rows are not in ascending order of their slots"
    whole = slice(low, high) if high - low == len(groups) else torch.tensor(list(groups), device=device)
    if len(slots) == len(groups) * height:
        return DecodeRows(whole, len(groups), height, len(slots), source=None, places=None)
    source = [rows[min(place, len(rows) - 1)] for rows in groups.values() for place in range(height)]
    places = [group * height + place for group, rows in enumerate(groups.values()) for place in range(len(rows))]
    index = torch.tensor([*source, *places], device=device)
    return DecodeRows(whole, len(groups), height, len(slots), index[: len(source)], index[len(source) :])


def _rows_of(table: _LinearTable, slot: int, rank: int) -> Tensor:
    """A's rows (r, d_in) of one linear in one slot."""
    assert table.group.A is not None
    return table.group.A[slot, table.place * rank : (table.place + 1) * rank]


def _make_tables(
    sizes: Mapping[str, tuple[int, int]], input_groups: Iterable[Sequence[str]]
) -> dict[str, _LinearTable]:
    tables: dict[str, _LinearTable] = {}
    grouped = {linear for group in input_groups for linear in group}
    for linears in (*input_groups, *([linear] for linear in sizes if linear not in grouped)):
        group = _InputGroup(tuple(linears), sizes[linears[0]][0])
        for place, linear in enumerate(linears):
            d_in, d_out = sizes[linear]
            assert d_in == group.d_in, f"the linears {linears} cannot read the same input"
            tables[linear] = _LinearTable(group, place, d_in, d_out)
    return tables


class InputGroupFinder(AddedMix):
    """A mix that adds nothing and notes which linears follow each other on the same input tensor."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._x: Tensor | None = None

    def add(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """y itself."""
        if self._x is x:
            self.groups[-1].append(linear)
        else:
            self.groups.append([linear])
        self._x = x
        return y
