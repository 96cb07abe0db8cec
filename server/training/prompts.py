"""The one renderer: a task's instruction and an input become the prompt, in training and in serving alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from server.errors import InvalidInput

DEFAULT_PROMPT_FORMAT = "definition-input-output"


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is laid out: the instruction once, then pairs of input and answer, the last one without answer."""

    instruction: str
    input: str
    answer: str
    separator: str  # between pairs

    def render(self, instruction: str, text: str, demonstrations: Sequence[tuple[str, str]]) -> str:
        header = self.instruction.format(instruction.strip()) if instruction.strip() else ""
        pairs = [self.input.format(i.strip()) + self.answer.format(o.strip()) for i, o in demonstrations]
        return header + self.separator.join([*pairs, self.input.format(text.strip())])

    @property
    def next_pair(self) -> str:
        """The text that begins another pair after an answer."""
        return self.separator + self.input.split("{}")[0].rstrip()


PROMPT_FORMATS: Mapping[str, PromptFormat] = {
    DEFAULT_PROMPT_FORMAT: PromptFormat(
        instruction="Definition: {}\n\n", input="Input: {}\n\nOutput:", answer=" {}", separator="\n\n"
    )
}


def render_prompt(
    prompt_format: str, instruction: str, text: str, demonstrations: Sequence[tuple[str, str]] = ()
) -> str:
    """The prompt of one input under a named format, after demonstrations (input, answer) where there are any.

    Raises InvalidInput for an unknown format.
    """
    return find_prompt_format(prompt_format).render(instruction, text, demonstrations)


def find_prompt_format(name: str) -> PromptFormat:
    """A prompt format by its name. Raises InvalidInput for an unknown one."""
    try:
        return PROMPT_FORMATS[name]
    except KeyError:
        known = ", ".join(PROMPT_FORMATS)
        raise InvalidInput(f"unknown prompt format {name!r}; this server knows {known}") from None


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, with whatever the tokenizer puts before a text."""
    return list(tokenizer(prompt)["input_ids"])


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer that follows a rendered prompt: one space and the text; none for an empty one."""
    answer = answer.strip()
    return list(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) if answer else []
