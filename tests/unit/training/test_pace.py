from __future__ import annotations

from types import SimpleNamespace

import pytest

from server.training import pace
from server.training.pace import Pace


def _ask(monkeypatch: pytest.MonkeyPatch, seconds: list[float], first: int = 1, steps: int = 60) -> list[float | None]:
    """What a pace says after each of these steps, which took so many seconds."""
    ends = iter([sum(seconds[: i + 1]) for i in range(len(seconds))])
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: next(ends)))  # no other thread asks this clock
    asked = Pace()
    return [asked.remaining_s(first + i, steps) for i in range(len(seconds))]


def test_the_first_step_says_nothing_and_the_last_that_nothing_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ask(monkeypatch, [7.0, 2.0, 2.0], steps=3) == [None, 2.0, 0.0]


def test_a_job_taken_up_again_is_timed_by_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ask(monkeypatch, [9.0, 2.0], first=41) == [None, 36.0]


def test_steps_that_became_shorter_promise_a_shorter_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    said = _ask(monkeypatch, [4.0] * 20 + [1.0] * 20)
    assert said[19] == 160.0  # 40 to go at 4 s
    assert said[39] == 20.0  # 20 to go at 1 s: the long ones are forgotten
