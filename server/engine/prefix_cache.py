"""Which prompt prefixes are kept, by adapter and token ids, so that they need not be computed again. No torch here.

Keys and values of a token depend on the adapter and on the tokens before it, and on nothing else. So a new prompt may
begin with those of an earlier prompt of the same adapter, as far as the tokens agree. A prefix is kept in blocks of
BLOCK_TOKENS tokens, which form a tree per adapter: prompts with a common beginning share its blocks. Reading is exact
to the token, since the last block may be used in part.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_TOKENS = 16
_TRIAL_SHARE = 4  # one in so many blocks may hold continuations that were seen once

Key = str | None  # of an adapter; None is the bare backbone


@dataclass(frozen=True)
class PrefixHit:
    """The first tokens of a prompt, as they are kept."""

    blocks: tuple[int, ...] = ()  # in the order of the tokens; the last may be needed in part
    num_tokens: int = 0


@dataclass(frozen=True)
class NewBlocks:
    """Blocks to be filled with a prompt's keys and values from position `start` on."""

    blocks: tuple[int, ...] = ()
    start: int = 0


@dataclass(eq=False)
class _Node:
    """A place in a tree: its root, or the end of a block."""

    children: dict[tuple[int, ...], _Block] = field(default_factory=dict)  # by the block's tokens


@dataclass(eq=False)
class _Block(_Node):
    """Blocks are compared by identity."""

    id: int = -1
    tokens: tuple[int, ...] = ()
    parent: _Node = field(default_factory=_Node)
    key: Key = None


class PrefixCache:
    """Hands out blocks 0 … num_blocks-1, the lowest free one first, and takes back what was used least recently.

    Two queues decide what leaves. What continues a kept prefix and was seen once, such as the private rest behind a
    task's instruction, is on trial: these blocks leave first, in the order they came, and are at most a quarter of
    all. Blocks that were used again, and a new adapter's first prompts, leave when they are the least recently used.
    A block always leaves before the one it continues.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_touched = 0  # blocks 0 … _num_touched-1 were handed out before
        self._free: list[int] = []  # a heap of those of them that came back
        self._roots: dict[Key, _Node] = {}
        # In both queues a block stands before the one it continues, so the first block is never continued within
        # its queue; no block of `_kept` continues one of `_trial`.
        self._kept: OrderedDict[_Block, None] = OrderedDict()
        self._trial: OrderedDict[_Block, None] = OrderedDict()

    @property
    def num_used(self) -> int:
        """Blocks that hold something."""
        return len(self._kept) + len(self._trial)

    def can_keep(self, num_tokens: int) -> bool:
        """Whether a prefix of so many tokens surely finds room."""
        return num_tokens // BLOCK_TOKENS <= self.num_blocks // _TRIAL_SHARE

    def match(self, key: Key, token_ids: Sequence[int], limit: int) -> PrefixHit:
        """The longest kept prefix of `token_ids`, of at most `limit` tokens."""
        node: _Node | None = self._roots.get(key)
        blocks: list[int] = []
        num_tokens = 0
        while node is not None:
            wanted = tuple(token_ids[num_tokens : min(num_tokens + BLOCK_TOKENS, limit)])
            child = node.children.get(wanted)
            if child is None:
                length, part = _best_part(node, wanted)
                ids = blocks if part is None else [*blocks, part.id]
                return PrefixHit(tuple(ids), num_tokens + length)
            blocks.append(child.id)
            num_tokens += BLOCK_TOKENS
            node = child
        return PrefixHit()

    def use(self, key: Key, token_ids: Sequence[int], hit: PrefixHit) -> None:
        """Note that a prompt begins with what `match` found."""
        path = self._walk(key, token_ids[: hit.num_tokens])
        if hit.num_tokens % BLOCK_TOKENS:
            # A block used in part alone has not shown that all of it is worth keeping: on trial, it stays there.
            node = path[-1] if path else self._roots[key]
            part = next(child for child in node.children.values() if child.id == hit.blocks[-1])
            if part in self._kept:
                self._kept.move_to_end(part)
        self._keep(path)

    def insert(self, key: Key, token_ids: Sequence[int]) -> NewBlocks:
        """Make room for what is not kept yet of a computed prompt, its last incomplete block aside.

        The caller fills the blocks, or discards them, before it calls anything else here.
        """
        path = self._walk(key, token_ids)
        self._keep(path)
        queue = self._trial if path else self._kept
        most = min(self.num_blocks - len(path), self.num_blocks // _TRIAL_SHARE if path else self.num_blocks)
        count = min(len(token_ids) // BLOCK_TOKENS - len(path), most)
        if count <= 0:
            return NewBlocks()
        self._make_room(count, on_trial=queue is self._trial)
        node = path[-1] if path else self._roots.setdefault(key, _Node())
        chain: list[_Block] = []
        for start in range(len(path) * BLOCK_TOKENS, (len(path) + count) * BLOCK_TOKENS, BLOCK_TOKENS):
            tokens = tuple(token_ids[start : start + BLOCK_TOKENS])
            block = _Block(id=self._take_id(), tokens=tokens, parent=node, key=key)
            node.children[tokens] = block
            chain.append(block)
            node = block
        for block in reversed(chain):
            queue[block] = None
        return NewBlocks(tuple(block.id for block in chain), len(path) * BLOCK_TOKENS)

    def discard(self, key: Key, token_ids: Sequence[int], new: NewBlocks) -> None:
        """Take back blocks that `insert` has just handed out."""
        path = self._walk(key, token_ids)
        for block in reversed(path[new.start // BLOCK_TOKENS :]):
            self._remove(block)

    def check_integrity(self) -> None:
        """Assert that every block is free or in one queue, in its place in the tree, and behind what continues it."""
        used = [*self._trial, *self._kept]
        ids = sorted([*self._free, *(block.id for block in used)])
        assert ids == list(range(self._num_touched)), "prefix blocks were lost or handed out twice"
        assert self._num_touched <= self.num_blocks, "there are more prefix blocks than the budget allows"
        assert len(self._trial) <= self.num_blocks // _TRIAL_SHARE, "too many prefix blocks are on trial"
        assert all(root.children for root in self._roots.values()), "a prefix tree is empty"
        left: set[_Block] = set()
        for block in used:
            assert block.parent.children.get(block.tokens) is block, "a prefix block is not where it belongs"
            assert not block.children or left.issuperset(block.children.values()), "a prefix would lose its middle"
            left.add(block)
        roots = {id(root) for root in self._roots.values()}
        assert all(block.parent in left or id(block.parent) in roots for block in used), "a prefix hangs in the air"

    def _walk(self, key: Key, token_ids: Sequence[int]) -> list[_Block]:
        """The kept blocks that `token_ids` covers from its beginning, without a gap."""
        node: _Node | None = self._roots.get(key)
        path: list[_Block] = []
        while node is not None:
            start = len(path) * BLOCK_TOKENS
            child = node.children.get(tuple(token_ids[start : start + BLOCK_TOKENS]))
            if child is not None:
                path.append(child)
            node = child
        return path

    def _keep(self, path: Sequence[_Block]) -> None:
        """Make these blocks the most recently used; those on trial have passed it."""
        for block in reversed(path):
            self._trial.pop(block, None)
            self._kept[block] = None
            self._kept.move_to_end(block)

    def _make_room(self, count: int, on_trial: bool) -> None:
        """Let blocks go until so many are free, and may go on trial if they are to."""
        while on_trial and len(self._trial) + count > self.num_blocks // _TRIAL_SHARE:
            self._remove(next(iter(self._trial)))
        while self.num_blocks - self.num_used < count:
            self._remove(next(iter(self._trial or self._kept)))

    def _take_id(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._num_touched += 1
        return self._num_touched - 1

    def _remove(self, block: _Block) -> None:
        assert not block.children, "a prefix block that others continue cannot go"
        del block.parent.children[block.tokens]
        self._trial.pop(block, None)
        self._kept.pop(block, None)
        heapq.heappush(self._free, block.id)
        root = self._roots[block.key]
        if not root.children:
            del self._roots[block.key]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens of the whole blocks with which both begin."""
    end = min(len(first), len(second)) // BLOCK_TOKENS * BLOCK_TOKENS
    for start in range(0, end, BLOCK_TOKENS):
        if first[start : start + BLOCK_TOKENS] != second[start : start + BLOCK_TOKENS]:
            return start
    return end


def _best_part(node: _Node, wanted: tuple[int, ...]) -> tuple[int, _Block | None]:
    """The child that begins with the most of the wanted tokens, and their number; (0, None) when none does."""
    best: tuple[int, _Block | None] = (0, None)
    for tokens, child in node.children.items():
        length = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), len(wanted))
        if length > best[0]:
            best = (length, child)
    return best
