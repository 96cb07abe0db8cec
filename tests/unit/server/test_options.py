from __future__ import annotations

import pytest

from server.engine.request import SamplingParams
from server.errors import InvalidInput
from server.options import GenerationOptions, merge_options


def test_nothing_set_is_the_engines_own_default() -> None:
    assert merge_options({}, {}) == (SamplingParams(), GenerationOptions())


def test_the_caller_wins_over_the_tasks_defaults() -> None:
    sampling, options = merge_options({"max_new_tokens": 9, "temperature": 0.5, "stop": ["a"]}, {"temperature": 0.0})
    assert (sampling.max_new_tokens, sampling.temperature) == (9, 0.0)
    assert options.stop == ("a",)


def test_a_default_minimum_gives_way_to_the_callers_smaller_limit() -> None:
    sampling, _ = merge_options({"min_new_tokens": 8}, {"max_new_tokens": 3})
    assert (sampling.min_new_tokens, sampling.max_new_tokens) == (3, 3)


def test_the_callers_own_contradiction_is_refused_with_its_place() -> None:
    with pytest.raises(InvalidInput) as caught:
        merge_options({}, {"min_new_tokens": 8, "max_new_tokens": 3})
    assert caught.value.param == "parameters.min_new_tokens"
    with pytest.raises(InvalidInput) as caught:
        merge_options({}, {"min_new_tokens": 100}, "defaults")
    assert caught.value.param == "defaults.min_new_tokens"


def test_choices_leave_the_sampling_defaults_aside() -> None:
    assert merge_options({"stop": ["x"], "temperature": 1.0}, {"choices": ["a", "b"]}) == (
        SamplingParams(),
        GenerationOptions(choices=("a", "b")),
    )
