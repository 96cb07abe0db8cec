"""A trainer's state as one safetensors document with a digest, so that damage is found when it is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.documents import read_document, write_document
from server.errors import InvalidInput

_FORMAT = "mhr-checkpoint-2"
_MOST_DESCRIBED = 6  # of another inventory every parameter differs, and nobody reads them all


@dataclass(frozen=True)
class Checkpoint:
    """A state after `step` steps under a trainer's `config`, with a caller's own `notes` (JSON)."""

    step: int
    config: Mapping[str, Any]
    notes: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        document = {
            "step": self.step,
            "config": dict(self.config),
            "notes": dict(self.notes),
            "digest": _digest(self.tensors),
        }
        return write_document(_FORMAT, document, self.tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Read what `to_bytes` made. Raises InvalidInput for anything else, damage included."""
        document, tensors = read_document(_FORMAT, data)
        if document.get("digest") != _digest(tensors):
            raise InvalidInput("its tensors are not those that were written")
        return cls(document["step"], document["config"], document["notes"], tensors)


def describe_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first few names whose values differ, with both values, and how many more; empty when none does."""
    different = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    shown = [f"{n} was {_shown(before.get(n))} and is {_shown(now.get(n))}" for n in different[:_MOST_DESCRIBED]]
    more = len(different) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more else shown)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
