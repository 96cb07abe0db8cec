from __future__ import annotations

import pytest
import torch

from server.errors import InvalidInput
from server.training.checkpoint import Checkpoint, describe_differences

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3), "empty": torch.zeros(0)}


def test_a_state_is_read_as_it_was_written() -> None:
    read = Checkpoint.from_bytes(Checkpoint(7, {"steps": 10}, {"best": 0.5}, TENSORS).to_bytes())
    assert (read.step, read.config, read.notes) == (7, {"steps": 10}, {"best": 0.5})
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_one_flipped_bit_is_found() -> None:
    data = bytearray(Checkpoint(7, {}, {}, TENSORS).to_bytes())
    data[data.index(TENSORS["a"].numpy().tobytes()) + 5] ^= 1
    with pytest.raises(InvalidInput, match="not those that were written"):
        Checkpoint.from_bytes(bytes(data))


@pytest.mark.parametrize("length", [0, 5, 200, -4])
def test_a_file_cut_short_is_found(length: int) -> None:
    with pytest.raises(InvalidInput, match="not a file of the form"):
        Checkpoint.from_bytes(Checkpoint(7, {}, {}, TENSORS).to_bytes()[:length])


def test_differences_are_named_with_both_values() -> None:
    before = {"rank": 4, "seed": 0, "temperature": None}
    assert describe_differences(before, before) == ""
    now = {"rank": 8, "seed": 0, "temperature": 2.0}
    assert describe_differences(before, now) == "rank was 4 and is 8, temperature was not set and is 2.0"


def test_of_many_differences_the_first_few_are_named() -> None:
    before, now = ({f"A.{i}": (8, size) for i in range(9)} for size in (2, 3))
    described = describe_differences(before, now).split(", A.")
    assert described[0] == "A.0 was (8, 2) and is (8, 3)"
    assert described[5] == "5 was (8, 2) and is (8, 3), and 3 more"
