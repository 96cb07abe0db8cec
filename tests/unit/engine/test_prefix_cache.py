"""The accounting of kept prefixes alone, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.prefix_cache import BLOCK_TOKENS, NewBlocks, PrefixCache, PrefixHit, shared_length

B = BLOCK_TOKENS
INSTRUCTION = tuple(range(100, 100 + 3 * B))


def prompt(number: int, rest: int = 2 * B) -> tuple[int, ...]:
    """The instruction and a private rest."""
    return (*INSTRUCTION, *range(1000 * (number + 1), 1000 * (number + 1) + rest))


def reuse(cache: PrefixCache, tokens: tuple[int, ...], key: str | None = "a") -> int:
    """What a sequence does: begin with what is kept, then keep its prompt. Returns the tokens it need not compute."""
    hit = cache.match(key, tokens, len(tokens) - 1)
    if hit.num_tokens:
        cache.use(key, tokens, hit)
    cache.insert(key, tokens)
    cache.check_integrity()
    return hit.num_tokens


def test_a_prompt_finds_the_common_beginning_to_the_token() -> None:
    cache = PrefixCache(20)
    assert reuse(cache, prompt(0)) == 0
    other = (*prompt(0)[: 3 * B + 5], 7, 7, 7)
    assert cache.match("a", other, len(other)) == PrefixHit((0, 1, 2, 3), 3 * B + 5)
    assert cache.match("a", other, B + 1) == PrefixHit((0, 1), B + 1)
    assert cache.match("a", other, B) == PrefixHit((0,), B)
    assert cache.match("a", (5, *other), B) == PrefixHit()


def test_keys_share_nothing() -> None:
    cache = PrefixCache(20)
    reuse(cache, prompt(0), "a")
    assert reuse(cache, prompt(0), "a@2") == 0
    assert reuse(cache, prompt(0), None) == 0
    assert cache.num_used == 15


def test_a_whole_prompt_seen_again_still_leaves_one_token_to_compute() -> None:
    cache = PrefixCache(20)
    reuse(cache, prompt(0))
    assert reuse(cache, prompt(0)) == 5 * B - 1
    assert cache.num_used == 5


def test_private_rests_take_a_quarter_of_the_blocks_at_most() -> None:
    cache = PrefixCache(40)
    for number in range(50):
        reuse(cache, prompt(number))
    assert cache.num_used == 5 + 10  # the first prompt, and five rests of two blocks
    assert cache.match("a", prompt(49), 5 * B).num_tokens == 5 * B
    assert cache.match("a", prompt(40), 5 * B).num_tokens == 3 * B


def test_a_rest_that_is_used_again_is_kept() -> None:
    cache = PrefixCache(40)
    for number in (0, 1, 1, *range(2, 20)):
        reuse(cache, prompt(number))
    assert cache.match("a", prompt(1), 5 * B).num_tokens == 5 * B
    assert cache.match("a", prompt(2), 5 * B).num_tokens == 3 * B


def test_a_used_instruction_outlives_private_rests_and_older_prefixes() -> None:
    cache = PrefixCache(12)
    reuse(cache, prompt(0), "old")
    for number in range(20):
        reuse(cache, prompt(number), "busy")
        reuse(cache, prompt(number, rest=0), f"new-{number}")
    assert cache.match("old", prompt(0), 99).num_tokens == 0
    assert cache.match("busy", prompt(99), 99).num_tokens == 3 * B


def test_a_conversation_goes_on_where_it_was() -> None:
    cache = PrefixCache(100)
    tokens = prompt(0)
    reuse(cache, tokens)
    for turn in range(4):
        tokens += tuple(range(50_000 * (turn + 1), 50_000 * (turn + 1) + B))
        assert reuse(cache, tokens) == len(tokens) - B


def test_a_prompt_larger_than_the_cache_keeps_its_beginning() -> None:
    cache = PrefixCache(2)
    assert cache.insert("a", prompt(0)) == NewBlocks((0, 1), 0)
    cache.check_integrity()
    assert cache.match("a", prompt(0), 99).num_tokens == 2 * B
    assert cache.insert("a", prompt(1)) == NewBlocks()  # its own beginning would have to go


def test_discarded_blocks_are_free_again() -> None:
    cache = PrefixCache(20)
    reuse(cache, prompt(0))
    new = cache.insert("a", prompt(1))
    assert new == NewBlocks((5, 6), 3 * B)
    cache.discard("a", prompt(1), new)
    cache.check_integrity()
    assert cache.match("a", prompt(1), 99).num_tokens == 3 * B
    first = cache.insert("b", prompt(1))
    cache.discard("b", prompt(1), first)
    cache.check_integrity()
    assert cache.num_used == 5


def test_without_blocks_nothing_is_kept() -> None:
    cache = PrefixCache(0)
    assert reuse(cache, prompt(0)) == reuse(cache, prompt(0)) == 0
    assert not cache.can_keep(B)


@pytest.mark.parametrize(("second", "length"), [(prompt(1), 3 * B), (prompt(0)[: 2 * B + 3], 2 * B), ((1, 2), 0)])
def test_shared_length_counts_whole_blocks(second: tuple[int, ...], length: int) -> None:
    assert shared_length(prompt(0), second) == length


@given(st.data())
def test_what_is_found_is_what_was_written(data: st.DataObject) -> None:
    """Blocks filled with the tokens before them, as keys and values depend on these, must read as the prompt asks."""
    cache = PrefixCache(data.draw(st.integers(0, 12)))
    content: dict[int, tuple[str | None, tuple[int, ...]]] = {}
    alphabet = st.sampled_from([0, 1])
    for _ in range(data.draw(st.integers(1, 25))):
        key = data.draw(st.sampled_from(["a", "b", None]))
        pieces = data.draw(st.lists(alphabet, min_size=1, max_size=6))
        tokens = tuple(piece for piece in pieces for _ in range(B)) + (9,) * data.draw(st.integers(0, B - 1))
        hit = cache.match(key, tokens, len(tokens) - 1)
        assert hit.num_tokens < len(tokens)
        for place, block in enumerate(hit.blocks):
            stored_key, stored = content[block]
            end = min((place + 1) * B, hit.num_tokens)
            assert (stored_key, stored[:end]) == (key, tokens[:end])
        if hit.num_tokens:
            cache.use(key, tokens, hit)
        cache.check_integrity()
        if data.draw(st.booleans()):
            new = cache.insert(key, tokens)
            for place, block in enumerate(new.blocks):
                content[block] = (key, tokens[: new.start + (place + 1) * B])
            if new.blocks and data.draw(st.integers(0, 4)) == 0:
                cache.discard(key, tokens, new)
        cache.check_integrity()
        assert cache.num_used <= cache.num_blocks
