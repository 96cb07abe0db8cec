from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, Segment, collate, encode_examples, shared_prefix
from server.training.examples import Example


def _encoded(task: int, prompt: str, *answers: str) -> EncodedExample:
    """Letters are tokens."""
    return EncodedExample(task, tuple(map(ord, prompt)), tuple(tuple(map(ord, answer)) for answer in answers))


def _text(tokens: torch.Tensor) -> str:
    return "".join(map(chr, tokens.tolist()))


def _sequences(batch: Batch) -> list[tuple[int, str, str]]:
    """(task, prompt, answer) of every sequence, read back from segments, lengths and the loss's places."""
    task_of_place = batch.tasks.repeat_interleave(torch.tensor(batch.lengths))
    found = []
    for segment in batch.segments:
        read = (batch.answers >= segment.start) & (batch.answers < segment.stop)
        if read.any():
            prefix, own = slice(segment.prefix_start, segment.prefix_stop), slice(segment.start, segment.stop)
            known = torch.cat((batch.tokens[prefix], batch.tokens[own]))
            answer = _text(batch.targets[read])
            whole = _text(known) + answer[-1]
            found.append((int(task_of_place[segment.start]), whole.removesuffix(answer), answer))
    return found


def test_a_tasks_common_beginning_stands_once() -> None:
    batch = collate([_encoded(7, "sort: ab", "xy"), _encoded(4, "say ", "z"), _encoded(7, "sort: c", "w")])
    assert batch.tasks.tolist() == [4, 7]
    assert _text(batch.tokens) == "say " + "sort: " + "abx" + "c"
    assert batch.position_ids.tolist() == [0, 1, 2, 3, *range(6), 6, 7, 8, 6]
    assert batch.lengths == (4, 10)
    assert batch.segments == (Segment(0, 4), Segment(4, 10), Segment(10, 13, 4, 10), Segment(13, 14, 4, 10))
    assert [example.task for example in batch.examples] == [4, 7, 7]
    assert batch.answer_lengths == (1, 2, 1)
    assert batch.num_sequences == 3


def test_the_loss_reads_the_answers_alone_and_every_sequence_alike() -> None:
    batch = collate([_encoded(0, "abc", "xy"), _encoded(1, "de", "uvw.")])
    assert _text(batch.tokens) == "abcx" + "deuvw"
    assert batch.answers.tolist() == [2, 3, 5, 6, 7, 8]
    assert _text(batch.targets) == "xyuvw."
    assert batch.mean_by_sequence(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])).tolist() == [1.5, 4.5]


def test_the_choices_pick_the_answers() -> None:
    batch = collate([_encoded(0, "a", "x", "y"), _encoded(0, "b", "z")], [1, 0])
    assert _text(batch.targets) == "yz"


def test_a_prompt_keeps_its_last_token_for_itself() -> None:
    assert shared_prefix([(1, 2, 3), (1, 2, 3)]) == 2
    assert shared_prefix([(1, 2, 3), (1, 2, 3, 4)]) == 2
    assert shared_prefix([(1, 2, 3), (1, 5, 3), (1, 2, 4)]) == 1
    assert shared_prefix([(1, 2), (3, 2)]) == 0
    assert shared_prefix([(1, 2, 3)]) == 0


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.text("ab", min_size=1, max_size=5), st.text("cd", min_size=1, max_size=3)),
        min_size=1,
        max_size=7,
    )
)
def test_nothing_is_lost_and_nothing_is_padded(rows: list[tuple[int, str, str]]) -> None:
    batch = collate([_encoded(task, prompt, answer) for task, prompt, answer in rows])
    assert sorted(_sequences(batch)) == sorted(rows)
    places = [place for segment in batch.segments for place in range(segment.start, segment.stop)]
    assert places == list(range(len(batch.tokens)))
    assert sum(batch.lengths) == len(batch.tokens) <= sum(len(prompt) + len(answer) - 1 for _, prompt, answer in rows)
    assert sum(batch.answer_lengths) == len(batch.answers)


def test_moving_a_batch_moves_its_tensors() -> None:
    batch = collate([_encoded(0, "ab", "c")]).to(torch.device("meta"))
    assert batch.tokens.device.type == batch.targets.device.type == "meta"
    assert batch.segments == (Segment(0, 2),)


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
