"""From examples to packed batches of token ids.

A batch is one row of tokens without padding. The sequences of one task lie together, and what their prompts begin
with in common (the rendered instruction) stands there once: under a causal model and one adapter per task, its
states are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
class Segment:
    """Tokens start … stop-1 of a batch; they follow on the tokens prefix_start … prefix_stop-1, if there are any."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def prefix_length(self) -> int:
        return self.prefix_stop - self.prefix_start

    @property
    def context(self) -> int:
        """Tokens that the segment's last token sees."""
        return self.prefix_length + self.length


@dataclass(frozen=True)
class Batch:
    """B sequences of N tasks as S tokens, sorted by task; of every answer all tokens but the last are among them."""

    tokens: Tensor  # (S,)
    position_ids: Tensor  # (S,) each token's place in its sequence
    tasks: Tensor  # (N,) the distinct tasks of the batch
    answers: Tensor  # (P,) places in S whose next token is an answer's
    targets: Tensor  # (P,) those next tokens
    examples: tuple[EncodedExample, ...]  # B: what each sequence shows
    answer_lengths: tuple[int, ...]  # B: how many of P are its answer's
    lengths: tuple[int, ...]  # N: the tokens of each task
    segments: tuple[Segment, ...]  # cover S in order: shared prefixes and what follows on them, or whole sequences

    @property
    def num_sequences(self) -> int:
        return len(self.examples)

    def mean_by_sequence(self, values: Tensor) -> Tensor:
        """values (P,) -> their means over each sequence's answer (B,)."""
        return torch.stack([own.mean() for own in torch.split(values, list(self.answer_lengths))])

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
    """One packed batch; `choices` picks one of each example's answers, the first by default."""
    by_task: dict[int, list[_Sequence]] = {}
    for example, choice in zip(examples, choices or [0] * len(examples), strict=True):
        by_task.setdefault(example.task, []).append((example, example.answers[choice]))
    packing = _Packing()
    for task in sorted(by_task):
        packing.add_task(by_task[task])
    return packing.batch(sorted(by_task))


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens that two or more prompts begin with in common; each keeps its last token for itself."""
    if len(prompts) < 2:
        return 0
    longest = min(len(prompt) for prompt in prompts) - 1
    # In lexical order the first and the last differ the soonest.
    first, last = min(prompts), max(prompts)
    return next((i for i in range(longest) if first[i] != last[i]), longest)


_Sequence = tuple[EncodedExample, tuple[int, ...]]  # and the answer that it shows


class _Packing:
    """Tokens laid one after another, with what the loss and the attention need to know of them."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._position_ids: list[int] = []
        self._answers: list[int] = []
        self._targets: list[int] = []
        self._examples: list[EncodedExample] = []
        self._answer_lengths: list[int] = []
        self._lengths: list[int] = []
        self._segments: list[Segment] = []

    def add_task(self, sequences: Sequence[_Sequence]) -> None:
        """All sequences of one task; each keeps its last prompt token, where the loss begins, for itself."""
        start = len(self._tokens)
        shared = shared_prefix([example.prompt for example, _ in sequences])
        if shared:
            self._add_segment(sequences[0][0].prompt[:shared])
        for example, answer in sequences:
            self._add_segment((*example.prompt[shared:], *answer[:-1]), (start, start + shared))
            self._add_answer(answer)
            self._examples.append(example)
        self._lengths.append(len(self._tokens) - start)

    def _add_segment(self, tokens: Sequence[int], prefix: tuple[int, int] = (0, 0)) -> None:
        start, first_position = len(self._tokens), prefix[1] - prefix[0]
        self._tokens += tokens
        self._position_ids += range(first_position, first_position + len(tokens))
        self._segments.append(Segment(start, len(self._tokens), *prefix))

    def _add_answer(self, answer: Sequence[int]) -> None:
        """The loss of the segment just added: its last tokens are followed by the answer's."""
        stop = len(self._tokens)
        self._answers += range(stop - len(answer), stop)
        self._targets += answer
        self._answer_lengths.append(len(answer))

    def batch(self, tasks: Sequence[int]) -> Batch:
        return Batch(
            tokens=torch.tensor(self._tokens),
            position_ids=torch.tensor(self._position_ids),
            tasks=torch.tensor(tasks),
            answers=torch.tensor(self._answers),
            targets=torch.tensor(self._targets),
            examples=tuple(self._examples),
            answer_lengths=tuple(self._answer_lengths),
            lengths=tuple(self._lengths),
            segments=tuple(self._segments),
        )
