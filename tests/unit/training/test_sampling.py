from __future__ import annotations

from itertools import islice

import pytest
import torch

from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample
from server.training.distributed import Processes
from server.training.rest import Rest
from server.training.sampling import BatchSampler, SamplingConfig, TaskSampling


def _encoded(task: int, prompt: int, *answers: int) -> EncodedExample:
    return EncodedExample(task, tuple(range(10, 10 + prompt)), tuple(tuple(range(50, 50 + n)) for n in answers))


def _whole_steps(sampler: BatchSampler, first: int, number: int) -> list[Batch]:
    return [batch for (batch,) in islice(sampler.from_step(first), number)]


def test_the_same_step_gives_the_same_batch_whenever_it_is_reached() -> None:
    examples = [_encoded(0, i % 9 + 1, 1, 2, 3) for i in range(50)]
    sampler = BatchSampler(examples, 8, seed=3)
    straight = _whole_steps(sampler, 0, 20)
    resumed = _whole_steps(BatchSampler(examples, 8, seed=3), 13, 7)
    for one, other in zip(straight[13:], resumed, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)


def test_an_epoch_shows_examples_once_and_uses_other_answers_in_time() -> None:
    examples = [EncodedExample(i, (10 + i,), ((50,), (51,))) for i in range(32)]
    batches = _whole_steps(BatchSampler(examples, 8, seed=0), 0, 4)
    assert sorted(task for batch in batches for task in batch.tasks.tolist()) == list(range(32))
    assert {token for batch in batches for token in batch.targets.tolist()} == {50, 51}


def test_any_two_examples_meet_in_some_step_whatever_their_lengths() -> None:
    examples = [_encoded(0, length, 1) for length in range(1, 25)]
    batches = _whole_steps(BatchSampler(examples, 8, seed=0), 0, 3 * 40)
    met = {(one.length, other.length) for batch in batches for one in batch.examples for other in batch.examples}
    assert len(met) == 24 * 24


def test_fewer_examples_than_a_batch_make_one_smaller_batch() -> None:
    sampler = BatchSampler([_encoded(0, 2, 1), _encoded(0, 3, 1)], 8, seed=0)
    (batch,) = _whole_steps(sampler, 5, 1)
    assert batch.num_sequences == 2


def _uneven() -> list[EncodedExample]:
    """Tasks 0 and 1 with 80 and 20 examples, each of a prompt token of its own."""
    return [EncodedExample(int(i >= 80), (100 + i,), ((50,),)) for i in range(100)]


def _drawn(config: SamplingConfig, steps: int, batch_size: int = 8) -> list[list[int]]:
    sampler = BatchSampler(_uneven(), batch_size, seed=0, config=config)
    return [batch.tokens.tolist() for batch in _whole_steps(sampler, 0, steps)]


def _share_of_the_small_task(config: SamplingConfig) -> float:
    rows = [row for batch in _drawn(config, 600) for row in batch]
    return sum(row >= 180 for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (SamplingConfig(), 0.2),
        (SamplingConfig(TaskSampling.UNIFORM), 0.5),
        (SamplingConfig(TaskSampling.TEMPERATURE, temperature=2), 1 / 3),  # sqrt(20) / (sqrt(20) + sqrt(80))
        (SamplingConfig(TaskSampling.TEMPERATURE, temperature=1), 0.2),
        (SamplingConfig(TaskSampling.UNIFORM, rows_per_task=4), 0.5),
    ],
)
def test_tasks_are_drawn_by_their_probabilities(config: SamplingConfig, share: float) -> None:
    assert _share_of_the_small_task(config) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("tasks", list(TaskSampling))
def test_a_task_shows_all_its_examples_before_any_of_them_again(tasks: TaskSampling) -> None:
    sampler = BatchSampler(_uneven(), 10, seed=0, config=SamplingConfig(tasks))
    epoch = [row for groups in sampler._epoch(0) for group in groups for row in group]
    for task, size in ((0, 80), (1, 20)):
        seen = [row.example.prompt for row in epoch if row.example.task == task]
        repeats = [seen.count(prompt) for prompt in set(seen)]
        assert max(repeats) <= -(-len(seen) // size)


@pytest.mark.parametrize("tasks", list(TaskSampling))
def test_rows_of_a_task_stand_side_by_side(tasks: TaskSampling) -> None:
    for rows in _drawn(SamplingConfig(tasks, rows_per_task=4), 30):
        assert len(rows) == 8
        for first in (0, 4):
            group = rows[first : first + 4]
            assert len({row >= 180 for row in group}) == 1
            assert len(set(group)) == 4


def test_a_task_with_fewer_rows_than_a_group_repeats_them() -> None:
    examples = [EncodedExample(0, (100 + i,), ((50,),)) for i in range(3)]
    sampler = BatchSampler(examples, 8, seed=0, config=SamplingConfig(rows_per_task=4))
    rows = _whole_steps(sampler, 0, 1)[0].tokens.tolist()
    assert len(rows) == 4
    assert set(rows) == {100, 101, 102}


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(TaskSampling.UNIFORM, rows_per_task=2)])
def test_the_same_step_whenever_it_is_reached_under_any_sampling(config: SamplingConfig) -> None:
    straight = _drawn(config, 40)
    resumed = _whole_steps(BatchSampler(_uneven(), 8, seed=0, config=config), 25, 15)
    assert [batch.tokens.tolist() for batch in resumed] == straight[25:]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shares_of_all_processes_are_the_whole_step(world_size: int) -> None:
    config = SamplingConfig(rows_per_task=2)
    sampler = BatchSampler(_uneven(), 16, seed=0, config=config)
    whole = [sorted(batch.tokens.tolist()) for batch in _whole_steps(sampler, 3, 5)]
    shares = [list(islice(sampler.from_step(3, 4, Processes(rank, world_size)), 5)) for rank in range(world_size)]
    for step, rows in enumerate(whole):
        pieces = [piece for share in shares for piece in share[step]]
        assert all(piece.num_sequences in (2, 4) for piece in pieces)
        assert sorted(row for piece in pieces for row in piece.tokens.tolist()) == rows


def test_the_pieces_of_a_step_are_alike_in_length() -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [_encoded(0, length, 1) for length in torch.randint(1, 200, (64,), generator=generator).tolist()]
    for pieces in islice(BatchSampler(examples, 8, seed=0).from_step(0, 4), 8):
        lengths = [[example.length for example in piece.examples] for piece in pieces]
        short, long = sorted(map(sum, lengths))
        assert long - short <= max(map(max, lengths)) - min(map(min, lengths))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(InvalidInput, match="rows_per_task"):
        SamplingConfig(rows_per_task=0)
    with pytest.raises(InvalidInput, match="temperature"):
        SamplingConfig(TaskSampling.TEMPERATURE, temperature=0)


def test_what_rests_is_left_out_until_its_steps_are_over() -> None:
    examples = [EncodedExample(0, (100 + i,), ((50,),)) for i in range(8)]
    sampler = BatchSampler(examples, 4, seed=0)
    rest = Rest(examples, steps=4, steps_per_epoch=sampler.steps_per_epoch)
    assert (sampler.steps_per_epoch, sampler.sequences_per_step) == (2, 4)
    steps = sampler.from_step(0, rest=rest)
    (first,), (second,) = next(steps), next(steps)
    assert {*first.examples, *second.examples} == set(examples)
    rest.note([*first.examples, *second.examples], [0.5, *[0.001] * 7], step=1)
    epochs = [[example for batches in islice(steps, 2) for b in batches for example in b.examples] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [1, 1, 8]
    assert epochs[0] == epochs[1] == [first.examples[0]]


def test_a_step_of_which_all_rests_has_no_batch() -> None:
    examples = _uneven()[:8]
    rest = Rest(examples, steps=1, steps_per_epoch=1)
    rest.note(examples, [0.0] * 8, step=0)
    sampler = BatchSampler(examples, 8, seed=0)
    assert [len(batches) for batches in islice(sampler.from_step(0, 4, rest=rest), 3)] == [0, 0, 2]
