from __future__ import annotations

import pytest

from server.training.batches import EncodedExample
from server.training.rest import Rest

A, B = (EncodedExample(0, (token,), ((9,),)) for token in (1, 2))


def test_only_what_is_known_rests_and_for_so_many_steps() -> None:
    rest = Rest([A, B], steps=2, steps_per_epoch=1)
    rest.note([A, B], [0.0029, 0.003], step=4)
    assert [rest.is_over(A, step) for step in (4, 5, 6, 7)] == [False, False, False, True]
    assert rest.is_over(B, 5)


def test_what_is_forgotten_is_trained_on_until_it_is_known_again() -> None:
    rest = Rest([A], steps=2, steps_per_epoch=1)
    rest.note([A], [0.0], step=0)
    rest.note([A], [0.5], step=3)
    assert rest.is_over(A, 4)


def test_without_steps_nothing_rests() -> None:
    rest = Rest([A], steps=0, steps_per_epoch=1)
    rest.note([A], [0.0], step=7)
    assert rest.is_over(A, 8)


@pytest.mark.parametrize(("steps_per_epoch", "returns"), [(1, 4), (2, 7), (4, 11)])
def test_no_rest_is_longer_than_three_epochs(steps_per_epoch: int, returns: int) -> None:
    rest = Rest([A], steps=10, steps_per_epoch=steps_per_epoch)
    rest.note([A], [0.0], step=0)
    assert next(step for step in range(1, 20) if rest.is_over(A, step)) == returns


def test_another_goes_on_from_its_state() -> None:
    rest, other = Rest([A, B, A], steps=3, steps_per_epoch=1), Rest([A, B, A], steps=3, steps_per_epoch=1)
    rest.note([B], [0.0], step=2)
    other.load(rest.state())
    assert other.is_over(A, 3)
    assert not other.is_over(B, 5)
    assert other.is_over(B, 6)
