"""From examples to padded batches: tokenised once, of similar length, the same at every resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from server.errors import InvalidInput
from server.training.examples import Example
from server.training.prompts import encode_answer, encode_prompt, render_prompt

# Batches are cut from windows of this many batches sorted by length: little padding, and still a random mix.
_WINDOW = 16


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
                f"{place}[{number}] is {item.length} tokens long with its answer; the context holds {context_length}",
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


class BatchSampler:
    """Endless batches over epochs. The batch of a step depends on the seed and the step alone."""

    def __init__(self, examples: Sequence[EncodedExample], batch_size: int, seed: int) -> None:
        self._examples = examples
        self._batch_size = min(batch_size, len(examples))
        self._seed = seed
        self.steps_per_epoch = len(examples) // self._batch_size

    def from_step(self, step: int) -> Iterator[Batch]:
        """The batches of `step`, `step` + 1, …"""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            for batch in self._epoch(epoch)[first:]:
                yield batch()
                step += 1

    def _epoch(self, epoch: int) -> list[_Draw]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._examples), generator=generator).tolist()
        window = self._batch_size * _WINDOW
        rows: list[list[int]] = []
        for start in range(0, self.steps_per_epoch * self._batch_size, window):
            similar = sorted(order[start : start + window], key=lambda i: self._examples[i].length)
            rows += [similar[i : i + self._batch_size] for i in range(0, len(similar), self._batch_size)]
        shuffled = torch.randperm(len(rows), generator=generator).tolist()
        full = [rows[i] for i in shuffled if len(rows[i]) == self._batch_size][: self.steps_per_epoch]
        return [_Draw([self._examples[i] for i in batch], _answer_choices(generator, batch)) for batch in full]


@dataclass(frozen=True)
class _Draw:
    """A batch not yet padded: which examples, and for each a number that picks its answer."""

    examples: list[EncodedExample]
    picks: list[int]

    def __call__(self) -> Batch:
        choices = [pick % len(example.answers) for pick, example in zip(self.picks, self.examples, strict=True)]
        return collate(self.examples, choices)


def _answer_choices(generator: torch.Generator, batch: Sequence[int]) -> list[int]:
    return [int(i) for i in torch.randint(0, 1 << 30, (len(batch),), generator=generator)]
