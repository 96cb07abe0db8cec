from __future__ import annotations

from server.training.batches import EncodedExample
from server.training.rest import Rest

A, B = (EncodedExample(0, (token,), ((9,),)) for token in (1, 2))


def test_only_what_is_known_rests_and_for_so_many_turns() -> None:
    rest = Rest([A, B], turns=2)
    rest.note([A, B], [0.0029, 0.003], epoch=4)
    assert [rest.is_over(A, epoch) for epoch in (4, 5, 6, 7)] == [False, False, False, True]
    assert rest.is_over(B, 5)


def test_what_is_forgotten_is_trained_on_until_it_is_known_again() -> None:
    rest = Rest([A], turns=2)
    rest.note([A], [0.0], epoch=0)
    rest.note([A], [0.5], epoch=3)
    assert rest.is_over(A, 4)


def test_without_turns_nothing_rests() -> None:
    rest = Rest([A], turns=0)
    rest.note([A], [0.0], epoch=7)
    assert rest.is_over(A, 8)


def test_another_goes_on_from_its_state() -> None:
    rest, other = Rest([A, B, A], turns=3), Rest([A, B, A], turns=3)
    rest.note([B], [0.0], epoch=2)
    other.load(rest.state())
    assert other.is_over(A, 3)
    assert not other.is_over(B, 5)
    assert other.is_over(B, 6)
