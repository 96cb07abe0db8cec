"""Keys and values of kept prefixes, in blocks beside the slots of the running sequences."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from server.engine.attention import LayerCache
from server.engine.prefix_cache import BLOCK_TOKENS, NewBlocks, PrefixHit
from server.memory import lazy_zeros


class PrefixBlocks:
    """As many blocks as fit `budget_bytes`, over the caches of all layers.

    Prefixes are copied into and out of a sequence's slot, and not shared in place: attention over one contiguous
    slot per sequence is several times as fast on CPU as attention that gathers blocks at every step. A block's numbers
    lie together, those of one layer's keys or values in each of its parts.
    """

    def __init__(self, layers: Iterable[LayerCache], budget_bytes: int) -> None:
        self._slots = [table for layer in layers for table in (layer.keys, layer.values)]  # (S, C, KVH, head_dim) each
        sizes = [BLOCK_TOKENS * math.prod(table.shape[2:]) for table in self._slots]
        first = self._slots[0]
        self.block_bytes = sum(sizes) * first.element_size()
        self.num_blocks = budget_bytes // self.block_bytes
        # Blocks are taken lowest first, so this fills up from its beginning.
        blocks = lazy_zeros((self.num_blocks, sum(sizes)), first.dtype, first.device, dense=True)
        parts = torch.split(blocks, sizes, dim=1)
        self._parts = [  # (num_blocks, BLOCK_TOKENS, KVH, head_dim) each
            part.view(len(part), BLOCK_TOKENS, *table.shape[2:]) for part, table in zip(parts, self._slots, strict=True)
        ]

    def load(self, slot: int, hit: PrefixHit) -> None:
        """Copy a kept prefix to the beginning of a slot."""
        blocks = self._index(hit.blocks)
        for part, table in zip(self._parts, self._slots, strict=True):
            table[slot, : hit.num_tokens] = part.index_select(0, blocks).flatten(0, 1)[: hit.num_tokens]

    def save(self, slot: int, new: NewBlocks) -> None:
        """Fill new blocks from a slot."""
        span = slice(new.start, new.start + len(new.blocks) * BLOCK_TOKENS)
        blocks = self._index(new.blocks)
        for part, table in zip(self._parts, self._slots, strict=True):
            part.index_copy_(0, blocks, table[slot, span].view(-1, *part.shape[1:]))

    def _index(self, blocks: tuple[int, ...]) -> Tensor:
        return torch.tensor(blocks, device=self._slots[0].device)
