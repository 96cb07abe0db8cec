from __future__ import annotations

from itertools import islice

import pytest
import torch

from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import BatchSampler, EncodedExample, collate, encode_examples
from server.training.examples import Example


def _encoded(task: int, prompt: int, *answers: int) -> EncodedExample:
    return EncodedExample(task, tuple(range(10, 10 + prompt)), tuple(tuple(range(50, 50 + n)) for n in answers))


def test_the_loss_reads_the_answers_alone() -> None:
    batch = collate([_encoded(7, 3, 2), _encoded(4, 5, 3)])
    assert batch.tokens.tolist() == [[10, 11, 12, 50, 51, 0, 0, 0], [10, 11, 12, 13, 14, 50, 51, 52]]
    assert batch.targets.tolist() == [50, 51, 50, 51, 52]
    # The token after each position is its target: no prompt token, no padding.
    following = batch.tokens.flatten()[batch.positions + 1]
    assert torch.equal(following, batch.targets)


def test_every_sequence_counts_alike() -> None:
    batch = collate([_encoded(0, 3, 2), _encoded(0, 5, 4)])
    assert batch.weights.sum().item() == pytest.approx(1)
    assert batch.weights[:2].sum().item() == pytest.approx(0.5)


def test_rows_point_to_the_distinct_tasks() -> None:
    batch = collate([_encoded(7, 3, 1), _encoded(4, 3, 1), _encoded(7, 3, 1)])
    assert batch.tasks[batch.rows].tolist() == [7, 4, 7]
    assert batch.tasks.tolist() == [4, 7]


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


def test_an_example_over_the_context_is_named(backbone: Backbone) -> None:
    examples = [Example("short", ("yes",)), Example("x" * 300, ("yes",))]
    with pytest.raises(InvalidInput, match=r"validation\[1\] is \d+ tokens .* context holds 256"):
        encode_examples(
            backbone.tokenizer,
            examples,
            task=0,
            instruction="",
            prompt_format="definition-input-output",
            context_length=backbone.context_length,
            place="validation",
        )
