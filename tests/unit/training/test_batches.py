from __future__ import annotations

import pytest
import torch

from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import EncodedExample, collate, encode_examples
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


@pytest.mark.parametrize(
    ("place", "named"), [("", r"validation\[1\]"), ("f.json, Instances[7]", r"f\.json, Instances\[7\]")]
)
def test_an_example_over_the_context_is_named(backbone: Backbone, place: str, named: str) -> None:
    examples = [Example("short", ("yes",)), Example("x" * 300, ("yes",), place)]
    with pytest.raises(InvalidInput, match=rf"{named} is \d+ tokens .* context holds 256"):
        encode_examples(
            backbone.tokenizer,
            examples,
            task=0,
            instruction="",
            prompt_format="definition-input-output",
            context_length=backbone.context_length,
            place="validation",
        )
