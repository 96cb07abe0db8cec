"""Adapter slots: their accounting, and the mixed batch against one product per row."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.assembly import Adapter, LowRank
from server.adapters.slot_mix import Segment
from server.adapters.slot_operator import SlotOperator
from server.adapters.slots import AdapterSlots, InputGroupFinder
from server.errors import AdapterUnavailable
from server.native.library import load_library

SIZES = {"q": (6, 10), "k": (6, 4), "v": (6, 4), "o": (10, 6), "other": (3, 5)}
GROUPS = [["q", "k", "v"], ["o"]]


def adapter(seed: int, rank: int = 2, linears: tuple[str, ...] = ("q", "k", "v", "o")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: LowRank(
            torch.randn(SIZES[name][0], rank, generator=generator),
            torch.randn(rank, SIZES[name][1], generator=generator),
        )
        for name in linears
    }
    return Adapter(weights, alpha=3.0, rank=rank)


def expected(x: Tensor, y: Tensor, owners: list[Adapter | None], linear: str) -> Tensor:
    """One row at a time."""
    rows = []
    for row, owner in enumerate(owners):
        out = y[row]
        if owner is not None and linear in owner.weights:
            low_rank = owner.weights[linear]
            out = out + owner.scaling * (x[row] @ low_rank.A @ low_rank.B)
        rows.append(out)
    return torch.stack(rows)


def check(
    slots: AdapterSlots, decode: list[tuple[int, Adapter]], bare: int, segments: list[tuple[Adapter | None, int, int]]
) -> None:
    """Compare a step of decode rows, bare rows and prefill segments (adapter, slot, rows) with `expected`."""
    decode = sorted(decode, key=lambda pair: pair[0])
    owners: list[Adapter | None] = [owner for _, owner in decode] + [None] * bare
    placed = []
    for owner, slot, rows in segments:
        if owner is not None:
            placed.append(Segment(slot, len(owners), len(owners) + rows))
        owners += [owner] * rows
    mix = slots.mix([slot for slot, _ in decode], placed)
    assert mix is not None
    inputs = {group[0]: torch.randn(1, len(owners), SIZES[group[0]][0]) for group in GROUPS}
    for group in GROUPS:
        for linear in group:
            x = inputs[group[0]]
            y = torch.randn(1, len(owners), SIZES[linear][1])
            before = y.clone()
            found = mix.add(linear, x, y)
            torch.testing.assert_close(found[0], expected(x[0], before[0], owners, linear))
            untouched = [row for row, owner in enumerate(owners) if owner is None]
            assert torch.equal(found[0, untouched], before[0, untouched])


@pytest.fixture(params=["torch", "operator"])
def operator(request: pytest.FixtureRequest) -> SlotOperator | None:
    if request.param == "torch":
        return None
    library = load_library()
    return pytest.skip("the compiled operators were not built") if library is None else SlotOperator(library)


@pytest.fixture
def slots(operator: SlotOperator | None) -> AdapterSlots:
    return AdapterSlots(SIZES, 8, input_groups=GROUPS, operator=operator)


@pytest.mark.parametrize(
    ("decode", "bare", "segments"),
    [
        pytest.param([0, 1, 2, 3], 0, [], id="one row each, neighbouring slots"),
        pytest.param([0, 0, 1, 1, 2, 2], 2, [], id="equal groups and bare rows"),
        pytest.param([1, 1, 1, 4, 6, 6], 1, [], id="uneven groups, slots with holes"),
        pytest.param([5], 0, [(5, 3), (2, 4)], id="decode and prefill"),
        pytest.param([], 3, [(None, 2), (0, 1), (None, 3), (7, 2)], id="prefill alone"),
        pytest.param([3, 3, 3, 3, 7], 0, [], id="one busy slot"),
    ],
)
def test_every_row_gets_its_own_adapter(
    slots: AdapterSlots, decode: list[int], bare: int, segments: list[tuple[int | None, int]]
) -> None:
    adapters = {}
    for number in range(8):
        owner = adapter(number, rank=1 + number % 3)
        adapters[slots.acquire(str(number), owner)] = owner
    check(
        slots,
        [(slot, adapters[slot]) for slot in decode],
        bare,
        [(None if slot is None else adapters[slot], slot or 0, rows) for slot, rows in segments],
    )


def test_any_mix_equals_one_product_per_row(slots: AdapterSlots) -> None:
    choose = random.Random(1)
    for _ in range(40):
        held = {}
        for _ in range(choose.randint(1, 6)):
            seed = choose.randint(0, 30)
            linears = tuple(choose.sample(("q", "k", "v", "o"), choose.randint(1, 4)))
            owner = adapter(seed, choose.randint(1, 4), linears)
            key = f"{seed}-{owner.rank}-{linears}"
            held[key] = (slots.acquire(key, owner), owner)
        owners = list(held.values())
        decode = [choose.choice(owners) for _ in range(choose.randint(1, 9))]
        segments = [(o, s, choose.randint(1, 4)) for s, o in choose.sample(owners, choose.randint(0, len(owners)))]
        check(slots, decode, choose.randint(0, 2), segments)
        for key in held:
            slots.release(key)
        slots.check_integrity()


def test_tables_in_fp16_are_summed_in_fp32(operator: SlotOperator | None) -> None:
    slots = AdapterSlots(SIZES, 2, torch.float16, input_groups=GROUPS, operator=operator)
    owner = adapter(3)
    rounded = {n: LowRank(w.A.half().float(), (w.B * 1.5).half().float() / 1.5) for n, w in owner.weights.items()}
    slot = slots.acquire("a", owner)
    check(slots, [(slot, Adapter(rounded, 3.0, 2))] * 3, 1, [(Adapter(rounded, 3.0, 2), slot, 4)])


def test_an_output_that_lies_otherwise_in_memory_is_added_to(slots: AdapterSlots) -> None:
    owner = adapter(3)
    mix = slots.mix([slots.acquire("a", owner)], [])
    assert mix is not None
    x, y = torch.randn(1, 6, 3).transpose(1, 2), torch.randn(1, 10, 3).transpose(1, 2)
    owners = [owner, None, None]
    torch.testing.assert_close(mix.add("q", x, y.clone())[0], expected(x[0], y[0], owners, "q"))


def test_linears_that_share_an_input_without_being_grouped_do_not_share_its_product(
    operator: SlotOperator | None,
) -> None:
    slots = AdapterSlots(SIZES, 2, operator=operator)
    owner = adapter(3)
    slot = slots.acquire("a", owner)
    mix = slots.mix([slot], [])
    assert mix is not None
    x = torch.randn(1, 1, 6)
    for linear in ("q", "k", "v"):
        y = torch.zeros(1, 1, SIZES[linear][1])
        torch.testing.assert_close(mix.add(linear, x, y.clone())[0], expected(x[0], y[0], [owner], linear))


def test_a_group_seen_again_with_another_input_is_computed_again(slots: AdapterSlots) -> None:
    owner = adapter(3)
    mix = slots.mix([slots.acquire("a", owner)], [])
    assert mix is not None
    for _ in range(2):
        x, y = torch.randn(1, 1, 6), torch.zeros(1, 1, 10)
        torch.testing.assert_close(mix.add("q", x, y.clone())[0], expected(x[0], y[0], [owner], "q"))


def test_linears_without_any_adapter_are_left_alone(slots: AdapterSlots) -> None:
    mix = slots.mix([slots.acquire("a", adapter(0))], [])
    assert mix is not None
    y = torch.randn(1, 1, 5)
    assert mix.add("other", torch.randn(1, 1, 3), y) is y


def test_no_rows_with_adapters_are_no_mix(slots: AdapterSlots) -> None:
    assert slots.mix([], []) is None


def test_a_larger_rank_keeps_what_is_resident(slots: AdapterSlots) -> None:
    small, large = adapter(0, rank=1), adapter(1, rank=5)
    first, second = slots.acquire("small", small), slots.acquire("large", large)
    assert slots.rank == 5
    check(slots, [(first, small), (second, large)], 0, [])


def test_the_same_key_shares_a_slot_and_stays_until_its_place_is_needed() -> None:
    slots = AdapterSlots(SIZES, 2, input_groups=GROUPS)
    a = slots.acquire("a", adapter(0))
    assert slots.acquire("a", adapter(0)) == a
    b = slots.acquire("b", adapter(1))
    assert not slots.can_acquire("c")
    slots.release("a")
    assert not slots.can_acquire("c")
    slots.release("b")
    slots.release("a")
    assert slots.acquire("c", adapter(2)) == b, "the least recently used one goes first"
    assert slots.acquire("a", adapter(0)) == a
    slots.check_integrity()


def test_an_adapter_that_does_not_fit_takes_no_slot(slots: AdapterSlots) -> None:
    with pytest.raises(AdapterUnavailable, match="no linear named 'z'"):
        slots.acquire("a", Adapter({"z": LowRank(torch.zeros(2, 1), torch.zeros(1, 2))}, 1.0, 1))
    with pytest.raises(AdapterUnavailable, match=r"'q' has sizes \(5, 10\), the backbone's are \(6, 10\)"):
        slots.acquire("a", Adapter({"q": LowRank(torch.zeros(5, 1), torch.zeros(1, 10))}, 1.0, 1))
    slots.check_integrity()
    assert len({slots.acquire(str(n), adapter(n)) for n in range(8)}) == 8


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_no_slot_is_lost_or_shared_by_two_keys(actions: list[tuple[bool, int]]) -> None:
    slots = AdapterSlots({"q": (2, 2)}, 3)
    one = Adapter({"q": LowRank(torch.zeros(2, 1), torch.zeros(1, 2))}, 1.0, 1)
    held: dict[str, tuple[int, int]] = {}
    for acquire, number in actions:
        key = str(number)
        if acquire and slots.can_acquire(key):
            held[key] = (slots.acquire(key, one), held.get(key, (0, 0))[1] + 1)
        elif not acquire and key in held:
            slots.release(key)
            held[key] = (held[key][0], held[key][1] - 1)
            if held[key][1] == 0:
                del held[key]
        places = [slot for slot, _ in held.values()]
        assert len(set(places)) == len(places)
        slots.check_integrity()


def test_the_finder_groups_linears_that_follow_each_other_on_one_tensor() -> None:
    finder = InputGroupFinder()
    x, z = torch.zeros(1), torch.zeros(1)
    for linear, value in (("q", x), ("k", x), ("o", z), ("gate", x), ("up", x)):
        assert finder.add(linear, value, z) is z
    assert finder.groups == [["q", "k"], ["o"], ["gate", "up"]]
