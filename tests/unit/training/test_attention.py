"""The attention by itself; test_loss.py has it inside of models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from server.errors import InvalidInput
from server.training import attention
from server.training.attention import PackedLayout, _attention, attend_blocks, attend_rows
from server.training.batches import Segment

SEGMENTS = (Segment(0, 3), Segment(3, 7, 0, 3), Segment(7, 8, 0, 3), Segment(8, 13))
Attend = Callable[..., Tensor]


def _draw(heads: int, head_dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, heads, 13, head_dim), generator=generator, dtype=torch.float64, requires_grad=True)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """Every segment with torch's own attention, over a context put together for it."""
    outs = []
    for s in SEGMENTS:
        context = [*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)]
        queries, keys = torch.arange(s.prefix_length, s.context)[:, None], torch.arange(s.context)
        mask = (keys <= queries) & (keys > queries - (window or 100))
        q, k, v = query[:, :, s.start : s.stop], key[:, :, context], value[:, :, context]
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("attend", [attend_blocks, attend_rows])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_equals_torchs_own_attention_and_its_gradients(
    attend: Attend, heads: int, kv_heads: int, window: int | None
) -> None:
    inputs = (_draw(heads, 5, 0), _draw(kv_heads, 5, 1), _draw(kv_heads, 4, 2))
    ours = attend(*inputs, 0.3, window, PackedLayout(SEGMENTS))
    theirs = _one_by_one(*inputs, window)
    assert ours.shape == (1, 13, heads, 4)
    torch.testing.assert_close(ours, theirs)
    reference = torch.autograd.grad(theirs.square().sum(), inputs)
    for mine, other in zip(torch.autograd.grad(ours.square().sum(), inputs), reference, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_blocks_of_any_size_keep_segments_apart(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK_TOKENS", limit)
    inputs = (_draw(4, 5, 0), _draw(2, 5, 1), _draw(2, 5, 2))
    for window in (None, 2):
        layout = PackedLayout(SEGMENTS)
        torch.testing.assert_close(attend_blocks(*inputs, 0.3, window, layout), _one_by_one(*inputs, window))
    spans = [(block.span.start, block.span.stop) for block in layout.blocks(2, 2, inputs[0])]
    assert spans == ([(0, 3), (3, 7), (7, 8), (8, 13)] if limit == 1 else [(0, 3), (3, 8), (8, 13)])


def test_an_attention_that_it_cannot_compute_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(InvalidInput, match="'softcap'"):
        _attention(torch.nn.Linear(1, 1), states, states, states, None, softcap=30.0)
