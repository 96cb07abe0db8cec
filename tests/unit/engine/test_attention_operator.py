from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.engine.attention import CachedAttention
from server.engine.attention_operator import AttentionOperator
from server.engine.batch import AttentionBatch, DecodeRun
from tests.unit.native.libraries import INSTRUCTIONS, LIBRARIES

each_operator = pytest.mark.parametrize(
    "operator", [AttentionOperator(library) for library in LIBRARIES], ids=INSTRUCTIONS
)


def _one(cache: Tensor, values: Tensor, query: Tensor, place: int, window: int | None, scaling: float) -> Tensor:
    """One row's attention by torch, of query (H, head_dim) -> (H, head_dim)."""
    context = cache.shape[1]
    slot, position = divmod(place, context)
    first = 0 if window is None else max(0, position + 1 - window)
    keys, seen = (c[slot, first : position + 1].transpose(0, 1) for c in (cache, values))
    return scaled_dot_product_attention(query[:, None], keys, seen, scale=scaling, enable_gqa=True)[:, 0]


@each_operator
@pytest.mark.parametrize("window", [None, 5])
def test_rows_attend_as_with_torch_and_are_kept(operator: AttentionOperator, window: int | None) -> None:
    choose = random.Random(1)
    for head_dim in (4, 16, 24, 64, 96, 7):
        kv_heads, groups, slots, context, rows = choose.randint(1, 3), choose.randint(1, 4), 6, 41, 4
        keys, values = torch.randn(2, slots, context, kv_heads, head_dim).unbind()
        # as a model gives them: heads before rows in two of three, and more rows behind those that decode
        query = torch.randn(kv_heads * groups, rows + 2, head_dim)
        key = torch.randn(rows + 2, kv_heads, head_dim).transpose(0, 1)
        value = torch.randn(kv_heads, rows + 2, head_dim)
        places = [slot * context + choose.randrange(context) for slot in choose.sample(range(slots), rows)]
        places[0] = places[0] // context * context  # a sequence's first token
        expected_keys, expected_values = keys.clone(), values.clone()
        for row, place in enumerate(places):
            expected_keys.view(-1, kv_heads, head_dim)[place] = key[:, row]
            expected_values.view(-1, kv_heads, head_dim)[place] = value[:, row]
        scaling = 1 / math.sqrt(head_dim)
        out = operator.attend(keys, values, query, key, value, torch.tensor(places), scaling, window)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, expected_values)
        for row, place in enumerate(places):
            torch.testing.assert_close(out[row], _one(keys, values, query[:, row], place, window, scaling))


@each_operator
def test_sure_and_far_scores_are_no_trouble(operator: AttentionOperator) -> None:
    keys, values = torch.zeros(1, 40, 1, 16), torch.randn(1, 40, 1, 16)
    keys[0, :39, 0, 0] = torch.linspace(-3000, 0, 39)
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = 1.0
    key, value = torch.full((1, 1, 16), 500.0), torch.randn(1, 1, 16)
    out = operator.attend(keys, values, query, key, value, torch.tensor([39]), 1.0, None)
    torch.testing.assert_close(out[0], value[0])


@each_operator
def test_a_number_that_is_none_spoils_its_row_alone(operator: AttentionOperator) -> None:
    keys, values = torch.randn(2, 2, 30, 2, 16).unbind()
    query, key, value = torch.randn(2, 2, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    key[1, 0, 3] = float("nan")
    out = operator.attend(keys, values, query, key, value, torch.tensor([20, 55]), 0.25, None)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


@each_operator
def test_a_rows_numbers_do_not_depend_on_the_batch(operator: AttentionOperator) -> None:
    keys, values = torch.randn(2, 8, 50, 3, 64).unbind()
    query, key, value = torch.randn(9, 8, 64), torch.randn(3, 8, 64), torch.randn(3, 8, 64)
    places = torch.arange(8) * 50 + torch.arange(8) * 6
    together = operator.attend(keys, values, query, key, value, places, 0.125, None)
    for row in range(8):
        own = slice(row, row + 1)
        alone = operator.attend(keys, values, query[:, own], key[:, own], value[:, own], places[own], 0.125, None)
        assert torch.equal(alone[0], together[row])


@each_operator
def test_values_of_another_size_than_keys_are_attended_by_torch(operator: AttentionOperator) -> None:
    compiled, torchs = CachedAttention(2, 8, operator), CachedAttention(2, 8)
    step = AttentionBatch(torch.tensor([0, 8]), 2, (DecodeRun(0, 0, 2, 1, None),), None, None, ())
    query, key, value = torch.randn(1, 4, 2, 6), torch.randn(1, 2, 2, 6), torch.randn(1, 2, 2, 10)
    outs = []
    for attention in (compiled, torchs):
        with attention.use(step):
            outs.append(attention.attend(0, query, key, value, 0.5, None))
    assert torch.equal(*outs)
