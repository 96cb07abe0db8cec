"""Which examples meet in a step: random, of similar length, and the same at every resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from server.training.batches import Batch, EncodedExample, collate

# Batches are cut from windows of this many batches sorted by length: little padding, and still a random mix.
_WINDOW = 16


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
