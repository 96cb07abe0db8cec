"""From examples to batches of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidInput
from server.training.examples import Example
from server.training.prompts import encode_answer, encode_prompt, render_prompt


@dataclass(frozen=True)
class EncodedExample:
    """One example as token ids; every answer ends with the end token."""

    task: int  # index into the run's tasks
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(answer) for answer in self.answers)


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, so that a causal model needs no mask; the loss reads answers alone."""

    tokens: Tensor  # (B, T)
    tasks: Tensor  # (N,) the distinct tasks of the batch
    rows: Tensor  # (B,) every sequence's place in `tasks`
    positions: Tensor  # (P,) places in the flattened (B * T) whose next token is an answer's
    targets: Tensor  # (P,) those next tokens
    weights: Tensor  # (P,) sums to 1: every sequence counts alike, and so does every token within it

    @property
    def num_sequences(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    task: int,
    instruction: str,
    prompt_format: str,
    context_length: int,
    place: str,
) -> list[EncodedExample]:
    """Tokenise one task's examples. Raises InvalidInput, naming `place` and row, for one over the context."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InvalidInput("the backbone's tokenizer has no end token, so an answer's end cannot be learnt")
    encoded = []
    for number, example in enumerate(examples):
        prompt = encode_prompt(tokenizer, render_prompt(prompt_format, instruction, example.input))
        answers = tuple((*encode_answer(tokenizer, output), end) for output in example.outputs)
        item = EncodedExample(task=task, prompt=tuple(prompt), answers=answers)
        if item.length > context_length:
            raise InvalidInput(
                f"{example.place or f'{place}[{number}]'} is {item.length} tokens long with its answer; "
                f"the context holds {context_length}",
                param=f"{place}[{number}]",
            )
        encoded.append(item)
    return encoded


def collate(examples: Sequence[EncodedExample], choices: Sequence[int] | None = None) -> Batch:
    """One padded batch; `choices` picks one of each example's answers, the first by default."""
    picked = [example.answers[choice] for example, choice in zip(examples, choices or [0] * len(examples), strict=True)]
    width = max(len(example.prompt) + len(answer) for example, answer in zip(examples, picked, strict=True))
    tokens = torch.zeros((len(examples), width), dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for row, (example, answer) in enumerate(zip(examples, picked, strict=True)):
        start = len(example.prompt)
        tokens[row, : start + len(answer)] = torch.tensor([*example.prompt, *answer])
        first = row * width + start - 1
        positions += range(first, first + len(answer))
        targets += answer
        weights += [1.0 / (len(examples) * len(answer))] * len(answer)
    distinct, rows = torch.unique(torch.tensor([example.task for example in examples]), return_inverse=True)
    return Batch(tokens, distinct, rows, torch.tensor(positions), torch.tensor(targets), torch.tensor(weights))
