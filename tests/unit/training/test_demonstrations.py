from __future__ import annotations

import pytest

from server.backbone import Backbone
from server.training.demonstrations import fit_demonstrations, order_demonstrations
from server.training.examples import Example
from server.training.prompts import DEFAULT_PROMPT_FORMAT, encode_prompt, render_prompt

SHOWN = [(f"number {i}", f"answer {i}") for i in range(6)]


def test_the_order_is_seeded_and_the_preferred_answer_is_shown() -> None:
    examples = [Example(str(i), (f"first {i}", "second")) for i in range(8)]
    ordered = order_demonstrations(examples, seed=1)
    assert sorted(ordered) == [(str(i), f"first {i}") for i in range(8)]
    assert ordered == order_demonstrations(examples, seed=1) != order_demonstrations(examples, seed=2)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_as_many_as_fit_and_not_one_more(backbone: Backbone, count: int) -> None:
    exact = encode_prompt(backbone.tokenizer, render_prompt(DEFAULT_PROMPT_FORMAT, "Do.", "x", SHOWN[:count]))
    for room in (len(exact), len(exact) + 10):
        tokens, fitting = fit_demonstrations(backbone.tokenizer, DEFAULT_PROMPT_FORMAT, "Do.", "x", SHOWN, room)
        assert (tokens, fitting) == (exact, count)


def test_an_input_over_the_room_is_left_without_demonstrations(backbone: Backbone) -> None:
    tokens, fitting = fit_demonstrations(backbone.tokenizer, DEFAULT_PROMPT_FORMAT, "Do.", "x" * 50, SHOWN, 20)
    assert fitting == 0
    assert len(tokens) > 20
