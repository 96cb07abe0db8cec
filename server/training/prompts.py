"""The one renderer: a task's instruction and an input become the prompt, in training and in serving alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

from server.errors import InvalidInput

DEFAULT_PROMPT_FORMAT = "definition-input-output"


def _definition_input_output(instruction: str, text: str) -> str:
    definition = f"Definition: {instruction.strip()}\n\n" if instruction.strip() else ""
    return f"{definition}Input: {text.strip()}\n\nOutput:"


PROMPT_FORMATS: Mapping[str, Callable[[str, str], str]] = {DEFAULT_PROMPT_FORMAT: _definition_input_output}


def render_prompt(prompt_format: str, instruction: str, text: str) -> str:
    """The prompt of one input under a named format. Raises InvalidInput for an unknown format."""
    try:
        render = PROMPT_FORMATS[prompt_format]
    except KeyError:
        known = ", ".join(PROMPT_FORMATS)
        raise InvalidInput(f"unknown prompt format {prompt_format!r}; this server knows {known}") from None
    return render(instruction, text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with whatever the tokenizer puts before a text."""
    return list(tokenizer(prompt)["input_ids"])


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer that follows a rendered prompt: one space and the text; none for an empty one."""
    answer = answer.strip()
    return list(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) if answer else []
