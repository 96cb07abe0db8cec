"""Keys and values of kept prefixes, in blocks beside the slots of the running sequences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.attention import LayerCache
from server.engine.prefix_cache import BLOCK_TOKENS, NewBlocks, PrefixHit
from server.memory import lazy_zeros


@dataclass(frozen=True)
class _Table:
    """One layer's keys, or its values."""

    slots: Tensor  # (S, C, KVH, head_dim), of the running sequences
    blocks: Tensor  # (num_blocks, BLOCK_TOKENS, KVH, head_dim)


class PrefixBlocks:
    """As many blocks as fit `budget_bytes`, over the caches of all layers.

    Prefixes are copied into and out of a sequence's slot, and not shared in place: attention over one contiguous
    slot per sequence is several times as fast on CPU as attention that gathers blocks at every step.
    """

    def __init__(self, layers: Iterable[LayerCache], budget_bytes: int) -> None:
        slots = [table for layer in layers for table in (layer.keys, layer.values)]
        self.block_bytes = BLOCK_TOKENS * sum(t.shape[2] * t.shape[3] * t.element_size() for t in slots)
        self.num_blocks = budget_bytes // self.block_bytes
        self._tables = [
            _Table(t, lazy_zeros((self.num_blocks, BLOCK_TOKENS, *t.shape[2:]), t.dtype, t.device)) for t in slots
        ]

    def load(self, slot: int, hit: PrefixHit) -> None:
        """Copy a kept prefix to the beginning of a slot."""
        blocks = self._index(hit.blocks)
        for table in self._tables:
            table.slots[slot, : hit.num_tokens] = table.blocks.index_select(0, blocks).flatten(0, 1)[: hit.num_tokens]

    def save(self, slot: int, new: NewBlocks) -> None:
        """Fill new blocks from a slot."""
        span = slice(new.start, new.start + len(new.blocks) * BLOCK_TOKENS)
        blocks = self._index(new.blocks)
        for table in self._tables:
            table.blocks.index_copy_(0, blocks, table.slots[slot, span].view(-1, *table.blocks.shape[1:]))

    def _index(self, blocks: tuple[int, ...]) -> Tensor:
        return torch.tensor(blocks, device=self._tables[0].blocks.device)
