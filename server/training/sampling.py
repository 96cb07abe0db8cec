"""Which examples meet in a step: random, and the same at every resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate
from server.training.distributed import ALONE, Processes
from server.training.rest import Rest


class TaskSampling(StrEnum):
    """How often each task is drawn."""

    PROPORTIONAL = "proportional"  # as many examples as it has: every example once an epoch
    UNIFORM = "uniform"  # every task alike
    TEMPERATURE = "temperature"  # by its number of examples to the power of 1 / temperature


@dataclass(frozen=True)
class SamplingConfig:
    """How tasks are drawn, and how many rows of a task stand together in a step."""

    tasks: TaskSampling = TaskSampling.PROPORTIONAL
    temperature: float = 2.0
    rows_per_task: int = 1

    def __post_init__(self) -> None:
        if self.rows_per_task < 1:
            raise InvalidInput("rows_per_task must be at least 1", param="rows_per_task")
        if not self.temperature > 0:
            raise InvalidInput("temperature must be above 0", param="temperature")

    def shares(self, sizes: Sequence[int]) -> torch.Tensor:
        """The probability of each task (T,), fp64, given the tasks' numbers of examples."""
        exponent = {
            TaskSampling.PROPORTIONAL: 1.0,
            TaskSampling.UNIFORM: 0.0,
            TaskSampling.TEMPERATURE: 1.0 / self.temperature,
        }[self.tasks]
        powers = torch.tensor(sizes, dtype=torch.float64) ** exponent
        return powers / powers.sum()


@dataclass(frozen=True)
class _Row:
    """An example in a step, and which of its answers it shows."""

    example: EncodedExample
    choice: int


class BatchSampler:
    """Endless steps of `batch_size` sequences. What a step holds depends on the seed and its number alone.

    A step is made of groups: `rows_per_task` rows of one task, side by side. In an epoch a task shows each of
    its examples once before any of them again.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        batch_size: int,
        seed: int,
        config: SamplingConfig | None = None,
    ) -> None:
        self._examples = examples
        self._config = config or SamplingConfig()
        self._seed = seed
        self._members: dict[int, list[int]] = {}
        for index, example in enumerate(examples):
            self._members.setdefault(example.task, []).append(index)
        rows = self._config.rows_per_task
        proportional = self._config.tasks is TaskSampling.PROPORTIONAL
        self._num_groups = (
            sum(math.ceil(len(members) / rows) for members in self._members.values())
            if proportional
            else max(1, len(examples) // rows)
        )
        self._groups_per_step = min(max(1, batch_size // rows), self._num_groups)
        self.steps_per_epoch = self._num_groups // self._groups_per_step
        self.sequences_per_step = self._groups_per_step * rows

    def from_step(
        self, step: int, piece_size: int | None = None, processes: Processes = ALONE, rest: Rest | None = None
    ) -> Iterator[list[Batch]]:
        """This process's share of `step`, `step` + 1, …: one batch, or batches of at most `piece_size` sequences.

        The shares of all processes are the whole step, and no group is cut. Examples that rest are left out, as `rest`
        says when the step is asked for; a step of which nothing remains has no batch.
        """
        for number, groups in enumerate(self._steps(step), step):
            share = groups[processes.rank :: processes.world_size]
            if rest is not None:
                share = _without_resting(share, rest, number)
            yield [_collate(piece) for piece in self._pieces(share, piece_size)]

    def _pieces(self, groups: list[list[_Row]], piece_size: int | None) -> list[list[list[_Row]]]:
        """Groups stand by length, so each piece takes some from all over: pieces take as long as one another."""
        if piece_size is None or not groups:
            return [groups] if groups else []
        pieces = math.ceil(len(groups) / max(1, piece_size // self._config.rows_per_task))
        return [groups[i::pieces] for i in range(pieces)]

    def _steps(self, step: int) -> Iterator[list[list[_Row]]]:
        """The groups of `step`, `step` + 1, …"""
        while True:
            epoch, first = divmod(step, self.steps_per_epoch)
            for groups in self._epoch(epoch)[first:]:
                yield groups
                step += 1

    def _epoch(self, epoch: int) -> list[list[list[_Row]]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        groups = self._draw_groups(generator)
        size = self._groups_per_step
        steps = (groups[place * size : (place + 1) * size] for place in range(self.steps_per_epoch))
        return [[self._with_answers(group, generator) for group in sorted(step, key=self._length)] for step in steps]

    def _draw_groups(self, generator: torch.Generator) -> list[list[int]]:
        """An epoch's groups of examples, by index, in random order."""
        order = torch.randperm(len(self._examples), generator=generator).tolist()
        shuffled: dict[int, list[int]] = {task: [] for task in self._members}
        for index in order:
            shuffled[self._examples[index].task].append(index)
        turns = {task: _turns(indices, self._config.rows_per_task) for task, indices in shuffled.items()}
        if self._config.tasks is not TaskSampling.PROPORTIONAL:
            tasks = list(self._members)
            shares = self._config.shares([len(self._members[task]) for task in tasks])
            drawn = torch.multinomial(shares, self._num_groups, replacement=True, generator=generator)
            return [next(turns[tasks[i]]) for i in drawn.tolist()]
        rows = self._config.rows_per_task
        # A task's group stands where its first row stood in the shuffled order, so that the mix stays random.
        seen = dict.fromkeys(self._members, 0)
        groups = []
        for index in order:
            task = self._examples[index].task
            if seen[task] % rows == 0:
                groups.append(next(turns[task]))
            seen[task] += 1
        return groups

    def _length(self, group: Sequence[int]) -> int:
        return max(self._examples[i].length for i in group)

    def _with_answers(self, group: Sequence[int], generator: torch.Generator) -> list[_Row]:
        picks = torch.randint(0, 1 << 30, (len(group),), generator=generator).tolist()
        examples = [self._examples[i] for i in group]
        return [_Row(example, pick % len(example.answers)) for example, pick in zip(examples, picks, strict=True)]


def _turns(indices: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Groups of `rows` indices without end, each index once before any of them again."""
    place = 0
    while True:
        yield [indices[(place + i) % len(indices)] for i in range(rows)]
        place += rows


def _without_resting(groups: Sequence[Sequence[_Row]], rest: Rest, step: int) -> list[list[_Row]]:
    awake = ([row for row in group if rest.is_over(row.example, step)] for group in groups)
    return [group for group in awake if group]


def _collate(groups: Sequence[Sequence[_Row]]) -> Batch:
    rows = [row for group in groups for row in group]
    return collate([row.example for row in rows], [row.choice for row in rows])
