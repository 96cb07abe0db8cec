"""Resident adapters of the sequences in a batch.

Letters: S slots, d_in and d_out of a linear, r the largest rank seen.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from server.adapters.adapted_linear import AddedMix
from server.adapters.assembly import Adapter
from server.adapters.mixture_slots import MixtureSlots, SkillRows
from server.adapters.operator_mix import OperatorMix
from server.adapters.slot_mix import Segment, SlotMix, TorchRows, slots_of_rows
from server.adapters.slot_operator import GroupTables, SlotOperator
from server.adapters.slot_tables import LinearTable, describe_groups, describe_linears, make_tables
from server.errors import AdapterUnavailable
from server.memory import lazy_zeros


class AdapterSlots:
    """A fixed number of slots, each holding one adapter by key; shared, reference-counted, least recently used out.

    `linear_sizes` is {name: (d_in, d_out)}; `input_groups` names linears that read the same input tensor. `dtype` is
    the tables'. With an `operator` rows must be on CPU in fp32, and tables of one of its types; `mixtures` needs one.
    """

    def __init__(
        self,
        linear_sizes: Mapping[str, tuple[int, int]],
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        input_groups: Iterable[Sequence[str]] = (),
        operator: SlotOperator | None = None,
        mixtures: MixtureSlots | None = None,
    ) -> None:
        self.num_slots = num_slots
        self.dtype = dtype
        self.device = torch.device(device)
        self.rank = 0  # the largest seen; every table is padded to it
        assert mixtures is None or operator is not None
        self._operator = operator
        self._mixtures = mixtures
        self._tables = make_tables(linear_sizes, input_groups)
        self._linears: dict[str, GroupTables] = {}  # the same for the operator
        self._groups: dict[tuple[str, ...], GroupTables] = {}
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

    def skill_rows(self, decode_slots: Sequence[int]) -> SkillRows | None:
        """Of a step's one-token rows, which have these slots, those to be computed from an inventory's skills."""
        return None if self._mixtures is None else self._mixtures.choose(decode_slots)

    def mix(
        self, decode_slots: Sequence[int], segments: Sequence[Segment], skill_rows: SkillRows | None = None
    ) -> SlotMix | OperatorMix | None:
        """The mix of a step whose first rows are one-token rows of these slots, in ascending order, and whose
        segments lie behind them; all other rows have no adapter. None when no row has one.
        """
        if not decode_slots and not segments:
            return None
        if self._operator is not None:
            slots = slots_of_rows(decode_slots, segments)
            return OperatorMix(self._operator, self._linears, self._groups, self.rank, slots, skill_rows)
        rows = TorchRows(self.rank, decode_slots, self.device) if decode_slots else None
        return SlotMix(self._tables, self.rank, rows, tuple(segments))

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
        if self._mixtures is not None:
            self._mixtures.load(slot, adapter.mixture)
        if adapter.rank > self.rank:
            self._widen(adapter.rank)
        self._allocate(adapter.weights)
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
                B[:rank].copy_(weights.B * adapter.scaling)

    def _allocate(self, linears: Iterable[str]) -> None:
        new = [self._tables[linear] for linear in linears if self._tables[linear].B is None]
        for table in new:
            if table.group.A is None:
                table.group.A = self._zeros(len(table.group.linears) * self.rank, table.group.d_in)
            table.B = self._zeros(self.rank, table.d_out)
        if new:
            self._describe()

    def _describe(self) -> None:
        """Tell the operator where the tables lie."""
        if self._operator is not None:
            self._linears = describe_linears(self._tables, self.rank)
            self._groups = describe_groups(self._tables, self.rank)

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
        self._describe()

    def _zeros(self, *shape: int) -> Tensor:
        return lazy_zeros((self.num_slots, *shape), self.dtype, self.device)


def _rows_of(table: LinearTable, slot: int, rank: int) -> Tensor:
    """A's rows (r, d_in) of one linear in one slot."""
    assert table.group.A is not None
    return table.group.A[slot, table.columns(rank)]


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
