"""Rows times mixtures of an inventory's skills, by the compiled operator.

A row's input meets all K skills at once, and its routing weights mix what they give, so that the inventory is read once
for all rows, whatever their tasks. That is K times the arithmetic of slots, which matrix tiles of bf16 numbers (AMX) do
in less time than reading as many slots takes; see docs/decisions/0015-inventory-path.md.

Letters: h heads, K skills, r rank, S slots, N rows; d_in and d_out of a linear.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.inventory import Inventory
from server.native.library import Library

_TILE = 16  # rows of a tile, and columns of its sums
_DEPTH = 32  # bf16 numbers in a row of a tile
_ROWS = 32  # that go through the skills together
_MOST_SKILLS = 16
_MOST_NUMBERS = 256  # skills times rank
_MOST_INPUTS = 1024  # of one head


class SkillLinear(ctypes.Structure):
    """`struct SkillLinear` in server/native/operators.cpp."""

    _fields_ = (
        ("A", ctypes.c_void_p),
        ("B", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("d_out", ctypes.c_int64),
        ("column", ctypes.c_int64),
    )


class Skills(ctypes.Structure):
    """`struct Skills` in server/native/operators.cpp: linears that read the same input."""

    _fields_ = (
        ("linears", ctypes.POINTER(SkillLinear)),
        ("count", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("skills", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("d_in", ctypes.c_int64),
        ("slot_stride", ctypes.c_int64),
        ("scaling", ctypes.c_float),
    )


class SkillTiles:
    """An inventory in the layout of tiles. Raises ValueError for one that does not fit (`fits_tiles`)."""

    def __init__(self, inventory: Inventory) -> None:
        if not fits_tiles(inventory):
            raise ValueError("this inventory's numbers or sizes do not suit the tiles")
        self._inventory = inventory
        self._sizes = inventory.linear_sizes
        self._places = {linear: place for place, linear in enumerate(inventory.linears)}
        # A (h, K * r / 16, d_in / h / 32, 16, 16, 2) and B (h, d_out / h / 16, K * r / 32, 16, 16, 2), rounded up
        self._A = {linear: _to_tiles(A.transpose(1, 2).flatten(2)) for linear, A in inventory.A.items()}
        self._B = {linear: _to_tiles(B.flatten(1, 2)) for linear, B in inventory.B.items()}

    def describe(self, linears: Mapping[str, int], weights: Tensor) -> Skills | None:
        """For the operator: linears {name: d_out} that read the same input, their outputs side by side in this order,
        with the routing weights (S, L, h, K); these and the tiles must outlive the result. None when the inventory has
        none of the linears.
        """
        columns = accumulate(linears.values(), initial=0)
        parts = [
            SkillLinear(
                self._A[linear].data_ptr(),
                self._B[linear].data_ptr(),
                weights[0, self._places[linear]].data_ptr(),
                d_out,
                column,
            )
            for (linear, d_out), column in zip(linears.items(), columns, strict=False)
            if linear in self._places
        ]
        if not parts:
            return None
        inventory = self._inventory
        return Skills(
            (SkillLinear * len(parts))(*parts),
            len(parts),
            inventory.num_heads,
            inventory.num_skills,
            inventory.rank,
            next(self._sizes[linear][0] for linear in linears if linear in self._sizes),
            weights.stride(0),
            inventory.scaling,
        )


def fits_tiles(inventory: Inventory) -> bool:
    """Whether its numbers are bf16, and its sizes those that the operator was made for."""
    numbers = {tensor.dtype for tensor in (*inventory.A.values(), *inventory.B.values())}
    return (
        numbers == {torch.bfloat16}
        and _TILE % inventory.rank == 0
        and inventory.num_skills <= _MOST_SKILLS
        and inventory.num_skills * inventory.rank <= _MOST_NUMBERS
        and all(A.shape[2] <= _MOST_INPUTS for A in inventory.A.values())
    )


class SkillOperator:
    """Rows times mixtures of skills, by a library that `has_tiles`."""

    def __init__(self, library: Library) -> None:
        assert library.has_tiles
        self._mix_rows = library.operator("mhr_mix_rows")

    def room(self, skills: Skills) -> Tensor:
        """Memory to work in, for any number of rows."""
        return torch.empty(skills.count * skills.heads * _ROWS * _TILE)

    def add_rows(self, skills: Skills, x: Tensor, y: Tensor, slots: Tensor, room: Tensor, threads: int) -> None:
        """Add to the first rows of y (…, N, D), in place, what the mixtures in `slots` (rows,) make of those of
        x (…, N, d_in), leaving rows with a negative slot alone; in fp32 and int64, a row's numbers side by side.
        """
        assert x.is_contiguous()
        assert y.stride(-1) == 1
        self._mix_rows(
            ctypes.byref(skills),
            x.data_ptr(),
            y.data_ptr(),
            y.stride(-2),
            slots.data_ptr(),
            len(slots),
            room.data_ptr(),
            threads,
        )


def _to_tiles(numbers: Tensor) -> Tensor:
    """numbers (h, depth, columns) as tiles take them: (h, columns / 16, depth / 32, 16, 16, 2), zeros where they end.

    A tile's row has two neighbouring numbers of the depth for each of 16 columns.
    """
    heads, depth, columns = numbers.shape
    padded = F.pad(numbers, (0, -columns % _TILE, 0, -depth % _DEPTH))
    split = padded.view(heads, padded.shape[1] // _DEPTH, _DEPTH // 2, 2, padded.shape[2] // _TILE, _TILE)
    return split.permute(0, 4, 1, 2, 5, 3).contiguous()
