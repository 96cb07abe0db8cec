from __future__ import annotations

import pytest

from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.prompts import (
    DEFAULT_PROMPT_FORMAT,
    encode_answer,
    encode_prompt,
    find_prompt_format,
    render_prompt,
)


def test_definition_input_output() -> None:
    prompt = render_prompt(DEFAULT_PROMPT_FORMAT, " Name the capital. ", " France\n")
    assert prompt == "Definition: Name the capital.\n\nInput: France\n\nOutput:"


def test_a_task_without_instruction_has_no_definition() -> None:
    assert render_prompt(DEFAULT_PROMPT_FORMAT, "", "France") == "Input: France\n\nOutput:"


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"'haiku'.*definition-input-output"):
        render_prompt("haiku", "", "France")


def test_prompt_and_answer_are_the_tokens_of_the_whole_text(backbone: Backbone) -> None:
    prompt = render_prompt(DEFAULT_PROMPT_FORMAT, "Name the capital.", "France")
    tokens = encode_prompt(backbone.tokenizer, prompt) + encode_answer(backbone.tokenizer, " Paris ")
    assert backbone.tokenizer.decode(tokens) == f"{prompt} Paris"


def test_an_empty_answer_has_no_tokens(backbone: Backbone) -> None:
    assert encode_answer(backbone.tokenizer, "  ") == []


def test_demonstrations_stand_between_the_instruction_and_the_input() -> None:
    shown = [("Spain", " Madrid\n"), ("{odd}", "{}")]
    assert render_prompt(DEFAULT_PROMPT_FORMAT, "Name the capital.", "France", shown) == (
        "Definition: Name the capital.\n\nInput: Spain\n\nOutput: Madrid\n\nInput: {odd}\n\nOutput: {}\n\n"
        "Input: France\n\nOutput:"
    )


def test_a_demonstration_is_a_prompt_with_its_answer_and_the_next_pair() -> None:
    form = find_prompt_format(DEFAULT_PROMPT_FORMAT)
    prompt = render_prompt(DEFAULT_PROMPT_FORMAT, "Name it.", "Spain")
    assert render_prompt(DEFAULT_PROMPT_FORMAT, "Name it.", "France", [("Spain", "Madrid")]).startswith(
        f"{prompt} Madrid{form.next_pair}"
    )
