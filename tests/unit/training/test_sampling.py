from __future__ import annotations

from itertools import islice

import torch

from server.training.batches import EncodedExample
from server.training.sampling import BatchSampler


def _encoded(task: int, prompt: int, *answers: int) -> EncodedExample:
    return EncodedExample(task, tuple(range(10, 10 + prompt)), tuple(tuple(range(50, 50 + n)) for n in answers))


def test_the_same_step_gives_the_same_batch_whenever_it_is_reached() -> None:
    examples = [_encoded(0, i % 9 + 1, 1, 2, 3) for i in range(50)]
    sampler = BatchSampler(examples, 8, seed=3)
    straight = list(islice(sampler.from_step(0), 20))
    resumed = list(islice(BatchSampler(examples, 8, seed=3).from_step(13), 7))
    for one, other in zip(straight[13:], resumed, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.targets, other.targets)


def test_an_epoch_shows_examples_once_and_uses_other_answers_in_time() -> None:
    examples = [EncodedExample(i, (10 + i,), ((50,), (51,))) for i in range(32)]
    batches = list(islice(BatchSampler(examples, 8, seed=0).from_step(0), 4))
    assert sorted(task for batch in batches for task in batch.tasks.tolist()) == list(range(32))
    assert {token for batch in batches for token in batch.targets.tolist()} == {50, 51}


def test_batches_are_of_similar_length() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (512,), generator=generator).tolist()
    examples = [_encoded(0, length, 1) for length in lengths]
    batches = list(islice(BatchSampler(examples, 16, seed=0).from_step(0), 32))
    padded = sum(batch.tokens.numel() for batch in batches)
    assert padded < 1.15 * sum(example.length for example in examples)


def test_fewer_examples_than_a_batch_make_one_smaller_batch() -> None:
    sampler = BatchSampler([_encoded(0, 2, 1), _encoded(0, 3, 1)], 8, seed=0)
    assert next(sampler.from_step(5)).tokens.shape[0] == 2
