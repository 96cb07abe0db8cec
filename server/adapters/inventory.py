"""The inventory: K skills x h heads x rank r over named linears of one backbone, and its file format.

An inventory file is one safetensors file: `<linear>.A` (h, K, d_in/h, r) and `<linear>.B` (h, K, r, d_out/h)
per adapted linear, `routing` (T, L, h, K) for its training tasks, and a JSON document under the
metadata key `mhr` with everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from server.adapters.documents import read_document, write_document
from server.errors import InvalidInput

FORMAT = "mhr-inventory-1"


@dataclass(frozen=True)
class InventoryTask:
    """A training task that an inventory brings along."""

    instruction: str
    licence: str = ""
    source: str = ""


@dataclass(frozen=True)
class ShapeGroup:
    """The inventory's linears of one shape, stacked in fp32, so that one einsum assembles them all."""

    linears: tuple[str, ...]
    rows: tuple[int, ...]  # the place of each linear in the routing's first axis
    A: Tensor  # (G, h, K, d_in/h, r)
    B: Tensor  # (G, h, K, r, d_out/h)


@dataclass(frozen=True)
class Inventory:
    """Skills over named linears, immutable.

    `A[linear]` is (h, K, d_in/h, r), `B[linear]` is (h, K, r, d_out/h). The order of `A`'s keys is
    the order of the linears (L) in every routing. `routings` maps a training task to logits (L, h, K).

    Raises InvalidInput when shapes disagree, naming the linear.
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]
    alpha: float
    backbone_fingerprint: str
    backbone_name: str
    prompt_format: str
    routings: Mapping[str, Tensor] = field(default_factory=dict)
    tasks: Mapping[str, InventoryTask] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)  # how it was made, for the card
    spread: float = 1.0  # how many times as far from their mean the skills were moved (server/adapters/spread.py)

    def __post_init__(self) -> None:
        if not self.A or list(self.A) != list(self.B):
            raise InvalidInput("an inventory needs A and B for at least one linear, and for the same linears")
        if not 1 <= self.spread < math.inf:
            raise InvalidInput(f"an inventory's spread is a number of at least 1, not {self.spread}")
        _check_dimensions(self.A, self.B)
        for linear in self.A:
            _check_linear(linear, self.A[linear], self.B[linear], self.num_heads, self.num_skills, self.rank)
        expected = self.routing_shape
        for task, logits in self.routings.items():
            if tuple(logits.shape) != expected:
                raise InvalidInput(f"the routing of task {task!r} has shape {tuple(logits.shape)}, expected {expected}")

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(self.A)

    @property
    def num_heads(self) -> int:
        return next(iter(self.A.values())).shape[0]

    @property
    def num_skills(self) -> int:
        return next(iter(self.A.values())).shape[1]

    @property
    def rank(self) -> int:
        return next(iter(self.A.values())).shape[3]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """{linear: (d_in, d_out)}."""
        return {
            linear: (self.num_heads * A.shape[2], self.num_heads * self.B[linear].shape[3])
            for linear, A in self.A.items()
        }

    @property
    def routing_shape(self) -> tuple[int, int, int]:
        """(L, h, K)."""
        return len(self.A), self.num_heads, self.num_skills

    @cached_property
    def groups(self) -> tuple[ShapeGroup, ...]:
        """The linears grouped by shape and stacked in fp32."""
        by_shape: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        for row, linear in enumerate(self.linears):
            by_shape.setdefault((self.A[linear].shape, self.B[linear].shape), []).append(row)
        return tuple(self._stack(rows) for rows in by_shape.values())

    def _stack(self, rows: list[int]) -> ShapeGroup:
        linears = tuple(self.linears[row] for row in rows)
        return ShapeGroup(
            linears=linears,
            rows=tuple(rows),
            A=torch.stack([self.A[linear].float() for linear in linears]),
            B=torch.stack([self.B[linear].float() for linear in linears]),
        )

    def to_bytes(self, dtype: torch.dtype = torch.bfloat16) -> bytes:
        """The inventory as one safetensors document, its skills cast to `dtype`, routings at least in fp16."""
        tensors = {f"{linear}.A": t.to(dtype) for linear, t in self.A.items()}
        tensors |= {f"{linear}.B": t.to(dtype) for linear, t in self.B.items()}
        if self.routings:
            precise = torch.float16 if dtype == torch.bfloat16 else dtype
            tensors["routing"] = torch.stack([t.to(precise) for t in self.routings.values()])
        document = {
            "alpha": self.alpha,
            "backbone_fingerprint": self.backbone_fingerprint,
            "backbone_name": self.backbone_name,
            "prompt_format": self.prompt_format,
            "linears": list(self.linears),
            "routed_tasks": list(self.routings),
            "tasks": {task: asdict(about) for task, about in self.tasks.items()},
            "training": dict(self.training),
            "spread": self.spread,
        }
        return write_document(FORMAT, document, tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Inventory:
        """Read a document made by `to_bytes`. Raises InvalidInput when it is not one."""
        document, tensors = read_document(FORMAT, data)
        try:
            linears = document["linears"]
            return cls(
                A={linear: tensors[f"{linear}.A"] for linear in linears},
                B={linear: tensors[f"{linear}.B"] for linear in linears},
                alpha=float(document["alpha"]),
                backbone_fingerprint=document["backbone_fingerprint"],
                backbone_name=document["backbone_name"],
                prompt_format=document["prompt_format"],
                routings={task: tensors["routing"][row] for row, task in enumerate(document["routed_tasks"])},
                tasks={task: InventoryTask(**about) for task, about in document["tasks"].items()},
                training=dict(document["training"]),
                spread=float(document.get("spread", 1.0)),
            )
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise InvalidInput(f"the inventory file is incomplete: {error} is missing or malformed") from error


def check_heads(linear: str, d_in: int, d_out: int, num_heads: int) -> None:
    """Raise InvalidInput, naming the linear, when the number of heads does not divide both its sizes."""
    if num_heads < 1 or d_in % num_heads or d_out % num_heads:
        raise InvalidInput(
            f"{num_heads} heads do not divide the linear {linear!r} of sizes d_in = {d_in}, d_out = {d_out}; "
            "choose a number of heads that divides every adapted size"
        )


def _check_dimensions(A: Mapping[str, Tensor], B: Mapping[str, Tensor]) -> None:
    for linear in A:
        for letter, tensor in (("A", A[linear]), ("B", B[linear])):
            if tensor.dim() != 4 or 0 in tensor.shape:
                raise InvalidInput(
                    f"linear {linear!r}: {letter} has shape {tuple(tensor.shape)}, expected four sizes of at least 1"
                )


def _check_linear(linear: str, A: Tensor, B: Tensor, num_heads: int, num_skills: int, rank: int) -> None:
    wanted = (num_heads, num_skills)
    if A.shape[:2] != wanted or B.shape[:2] != wanted:
        raise InvalidInput(
            f"linear {linear!r}: A {tuple(A.shape)} and B {tuple(B.shape)} do not both begin with (h, K) = {wanted}"
        )
    if A.shape[3] != rank or B.shape[2] != rank:
        raise InvalidInput(f"linear {linear!r}: A {tuple(A.shape)} and B {tuple(B.shape)} are not of rank {rank}")
