"""Copies of the model's weights with one task's adapter added, for tasks that have the batch to themselves.

A copy costs as much memory as the linears it replaces and saves every step the whole work of the adapter. The model's
own weights are never touched.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.adapters.assembly import Adapter, LowRank
from server.engine.request import AdapterHandle
from server.engine.threads import compute_alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergedMix:
    """An AdapterMix of one adapter for all rows, which is part of the weights already."""

    weights: Mapping[str, Tensor]  # linear -> (d_out, d_in), of the linears that the adapter covers

    def forward(self, linear: str, base: nn.Module, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), with the merged weight in the place of the base's own."""
        weight = self.weights.get(linear)
        if weight is None:
            y: Tensor = base(x)
            return y
        return nn.functional.linear(x, weight, base.bias)  # type: ignore[arg-type]  # typed as a module

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


@dataclass(frozen=True)
class MergedStats:
    """A snapshot for metrics; counts run from the start."""

    entries: int
    bytes: int
    evictions: int


class MergedCopies:
    """Merged copies by adapter key within a byte budget; the least recently used leave for a new one.

    A copy is made by a thread of its own, one at a time, when one adapter has had every row of `after_steps`
    consecutive steps; the steps go on meanwhile. `wait` has the caller wait for it instead, from the first step on.
    Call `take` in one thread only.
    """

    def __init__(self, linears: Mapping[str, nn.Module], budget_bytes: int, after_steps: int, wait: bool) -> None:
        self._linears = linears
        self._budget_bytes = budget_bytes
        self._after_steps = after_steps
        self._wait = wait
        self._alone: str | None = None  # the adapter of the last steps, and how many they were
        self._steps_alone = 0
        self._builder: threading.Thread | None = None
        self._failed: set[str] = set()
        self._lock = threading.Lock()  # guards what follows
        self._copies: OrderedDict[str, MergedMix] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._evictions = 0

    def take(self, handle: AdapterHandle | None) -> MergedMix | None:
        """The merged copy of the adapter that all rows of a step share, if it is there; ask once a step.

        None stands for a step whose rows have several adapters, or none.
        """
        key = None if handle is None else handle.key
        self._steps_alone = self._steps_alone + 1 if key == self._alone else 1
        self._alone = key
        if handle is None or self._budget_bytes == 0:
            return None
        if self._find(handle.key) is None and self._is_due(handle):
            self._build(handle)
        return self._find(handle.key)

    def stats(self) -> MergedStats:
        """A consistent snapshot; safe in any thread."""
        with self._lock:
            return MergedStats(len(self._copies), self._bytes, self._evictions)

    def check_integrity(self) -> None:
        """Assert that the bytes are accounted for and within the budget."""
        with self._lock:
            assert self._bytes == sum(copy.num_bytes for copy in self._copies.values()), "the bytes are miscounted"
            assert self._bytes <= self._budget_bytes, "the merged copies exceed their budget"

    def _find(self, key: str) -> MergedMix | None:
        with self._lock:
            if key in self._copies:
                self._copies.move_to_end(key)
            return self._copies.get(key)

    def _is_due(self, handle: AdapterHandle) -> bool:
        if handle.key in self._failed or (self._builder is not None and self._builder.is_alive()):
            return False
        if not self._wait and self._steps_alone < self._after_steps:
            return False
        return self._size(handle.adapter) <= self._budget_bytes

    def _build(self, handle: AdapterHandle) -> None:
        self._builder = threading.Thread(target=self._merge, args=(handle,), name="merge")
        self._builder.start()
        if self._wait:
            self._builder.join()

    def _merge(self, handle: AdapterHandle) -> None:
        """In the builder's thread: make room first, so that the budget also holds while the copy grows."""
        compute_alone()
        self._make_room(self._size(handle.adapter))
        try:
            copy = merge(self._linears, handle.adapter)
        except Exception:
            self._failed.add(handle.key)
            logger.exception("merging adapter %s failed; it goes on being served unmerged", handle.key)
            return
        with self._lock:
            self._copies[handle.key] = copy
            self._bytes += copy.num_bytes

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            while self._bytes + num_bytes > self._budget_bytes:
                _, copy = self._copies.popitem(last=False)
                self._bytes -= copy.num_bytes
                self._evictions += 1

    def _size(self, adapter: Adapter) -> int:
        return copy_bytes({linear: self._linears[linear] for linear in adapter.weights})


def copy_bytes(linears: Mapping[str, nn.Module]) -> int:
    """Bytes of a merged copy of these linears."""
    return sum(_weight(linear).nbytes for linear in linears.values())


@torch.inference_mode()
def merge(linears: Mapping[str, nn.Module], adapter: Adapter) -> MergedMix:
    """W + scaling * (A B)^T of every linear that the adapter covers, summed in fp32 and cast once."""
    weights = adapter.weights.items()
    return MergedMix({name: _merged(linears[name], low_rank, adapter.scaling) for name, low_rank in weights})


def _merged(linear: nn.Module, low_rank: LowRank, scaling: float) -> Tensor:
    weight = _weight(linear)
    A, B = (part.to(weight.device, torch.float32) for part in (low_rank.A, low_rank.B))
    return torch.addmm(weight.float(), B.T, A.T, alpha=scaling).to(weight.dtype)


def _weight(linear: nn.Module) -> Tensor:
    """(d_out, d_in)."""
    assert isinstance(linear.weight, Tensor)
    return linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
