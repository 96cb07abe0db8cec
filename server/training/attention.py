"""Causal attention over a packed batch: one row of tokens, cut into segments that follow on shared prefixes.

transformers looks an attention function up by name. Ours finds the batch's segments in what its thread has in force.

Letters: S tokens of the batch, H query heads, KVH key-value heads, G = H / KVH, n tokens of a segment or block, c
tokens of its context (prefix and own), R segments.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.attention_switch import AttentionSwitch, refuse_extras
from server.errors import InvalidInput
from server.training.batches import Segment
from server.training.norms import NormSwitch

NAME = "mhr_packed"
# Tokens of a block: fewer and larger products, against places computed only to be masked. Measured for 16 sequences of
# 3 tasks, a layer forward and back in fp32: 7.9 ms segment by segment, 6.6 ms with 64 tokens, 7.7 ms with 192.
_BLOCK_TOKENS = 64


class PackedAttention:
    """Switches one model to attention over packed batches, and to faster norms, while forward passes run."""

    def __init__(self, model: PreTrainedModel) -> None:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
        self._switch = AttentionSwitch(model, NAME)
        self._norms = NormSwitch(model)
        self._num_layers: int = model.config.num_hidden_layers
        self._passes = 0  # that run now
        self._lock = threading.Lock()  # around what begins with the first of them and ends with the last
        self._switched = ExitStack()

    @contextmanager
    def use(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Put a batch's segments in force for one forward pass of this thread.

        Raises InvalidInput at the end when a layer of the model did not ask our attention: it would have mixed
        sequences that must not see each other.
        """
        layout = _in_force.layout = PackedLayout(segments)
        with self._switched_model():
            yield
        if layout.calls != self._num_layers:
            raise InvalidInput(
                f"only {layout.calls} of the backbone's {self._num_layers} layers have an attention that this server "
                "can replace, so it cannot learn on packed batches; choose another backbone"
            )

    @contextmanager
    def _switched_model(self) -> Iterator[None]:
        with self._lock:
            if self._passes == 0:
                self._switched.enter_context(self._switch.engaged())
                self._switched.enter_context(self._norms.engaged())
            self._passes += 1
        try:
            yield
        finally:
            with self._lock:
                self._passes -= 1
                if self._passes == 0:
                    self._switched.close()


class _InForce(threading.local):
    """The layout of the batch that this thread computes."""

    layout: PackedLayout


_in_force = _InForce()


class PackedLayout:
    """A batch's segments, and the masks and indices made of them, which all layers share."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.calls = 0  # of the attention function
        self._blocks: dict[tuple[int | None, int], list[Block]] = {}
        self._groups: dict[int | None, list[SegmentRows]] = {}

    def blocks(self, window: int | None, groups: int, like: Tensor) -> list[Block]:
        """The segments as blocks with masks for G = `groups`, in the type and on the device of `like`."""
        key = (window, groups)
        if key not in self._blocks:
            runs = _runs(self.segments, _BLOCK_TOKENS)
            self._blocks[key] = [Block(_span(run), _block_mask(run, window, groups, like)) for run in runs]
        return self._blocks[key]

    def groups(self, window: int | None, device: torch.device) -> list[SegmentRows]:
        """The segments as padded rows: those without a prefix, and those with one."""
        if window not in self._groups:
            halves = [
                [s for s in self.segments if bool(s.prefix_length) is with_prefix] for with_prefix in (False, True)
            ]
            self._groups[window] = [SegmentRows(half, window, device) for half in halves if half]
        return self._groups[window]


@dataclass(frozen=True)
class Block:
    """Neighbouring segments that follow on the same prefix, or on none, as one wide one whose mask keeps them apart."""

    span: Segment
    mask: Tensor  # (n * G, c), 0 where a token may look and -inf elsewhere


class SegmentRows:
    """Segments as R padded rows of one size; index tensors say where each place reads, and where it goes."""

    def __init__(self, segments: Sequence[Segment], window: int | None, device: torch.device) -> None:
        length, context = max(s.length for s in segments), max(s.context for s in segments)
        queries = [_padded(range(s.start, s.stop), length) for s in segments]
        keys = [_padded([*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)], context) for s in segments]
        tokens = [(s.start + i, row * length + i) for row, s in enumerate(segments) for i in range(s.length)]
        self.shape = (len(segments), length, context)
        self.queries = torch.tensor(queries).flatten().to(device)  # (R * n,) places in S
        self.keys = torch.tensor(keys).flatten().to(device)  # (R * c,) places in S
        self.tokens = torch.tensor([place for place, _ in tokens]).to(device)  # the segments' places in S …
        self.rows = torch.tensor([place for _, place in tokens]).to(device)  # … and in R * n
        # A padded query sees some token, whichever, so that its softmax is a number; nobody reads it.
        prefixes = torch.tensor([s.prefix_length for s in segments])
        self.mask = _visible(prefixes, length, context, window)[:, None].to(device)  # (R, 1, n, c)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, layout: PackedLayout
) -> Tensor:
    """query (1, H, S, head_dim), key and value (1, KVH, S, head_dim) -> (1, S, H, head_dim), block by block.

    For a CPU: plain matrix products, no padding. torch's fused kernel is slow there on the way back: measured
    forward and back for 16 sequences of 107 tokens, 9 query and 3 key-value heads, bf16, one core, 54 ms, where plain
    products take 11 ms.
    """
    out: Tensor = _BlockAttention.apply(query, key, value, scaling, window, layout)  # type: ignore[no-untyped-call]
    return out


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, layout: PackedLayout
) -> Tensor:
    """The same by torch's fused kernel over padded rows: few launches, for a GPU."""
    out = query.new_empty((query.shape[2], query.shape[1], value.shape[3]))
    for group in layout.groups(window, query.device):
        rows, length, context = group.shape
        q = _rows(query, group.queries, rows, length)  # (R, H, n, head_dim)
        k, v = (_rows(states, group.keys, rows, context) for states in (key, value))  # (R, KVH, c, head_dim)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling, enable_gqa=True)
        flat = attended.transpose(1, 2).flatten(0, 1)  # (R * n, H, head_dim)
        out = out.index_copy(0, group.tokens, flat.index_select(0, group.rows))
    return out[None]


def _rows(states: Tensor, places: Tensor, rows: int, length: int) -> Tensor:
    """states (1, heads, S, head_dim) at places (rows * length,) -> (rows, heads, length, head_dim)."""
    chosen = states[0].index_select(1, places)
    return chosen.view(len(chosen), rows, length, -1).transpose(0, 1)


class _BlockAttention(torch.autograd.Function):
    """Attention block by block. A prefix's keys and values gather the gradients of all that follow on it.

    The G query heads of one key-value head stand as G queries of each token, so that keys and values are not
    repeated. What can be done for all blocks at once is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        layout: PackedLayout,
    ) -> Tensor:
        kv_heads = key.shape[1]
        queries = _by_token(query[0] * scaling, kv_heads)  # (KVH, S, G, head_dim)
        out = queries.new_empty((*queries.shape[:3], value.shape[3]))
        weights: list[Tensor] = []
        blocks = layout.blocks(window, queries.shape[2], query)
        for block in blocks:
            keys = _context(key[0], block.span).transpose(1, 2)  # (KVH, head_dim, c)
            scores = torch.baddbmm(block.mask.expand(kv_heads, -1, -1), _own(queries, block.span), keys)
            weights.append(torch.softmax(scores, dim=-1))  # (KVH, n * G, c)
            torch.bmm(weights[-1], _context(value[0], block.span), out=_own(out, block.span))
        ctx.save_for_backward(queries, key, value, *weights)
        ctx.scaling, ctx.spans = scaling, [block.span for block in blocks]
        return _by_head(out)[None].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, key, value, *weights = ctx.saved_tensors
        grad_out = _by_token(grad[0].transpose(0, 1), key.shape[1])  # (KVH, S, G, head_dim)
        grad_queries, grad_key, grad_value = torch.empty_like(queries), torch.zeros_like(key), torch.zeros_like(value)
        for span, weight in zip(ctx.spans, weights, strict=True):
            g = _own(grad_out, span)
            grad_weight = torch.bmm(g, _context(value[0], span).transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            torch.bmm(grad_scores, _context(key[0], span), out=_own(grad_queries, span))
            _add_context(grad_key[0], span, torch.bmm(grad_scores.transpose(1, 2), _own(queries, span)))
            _add_context(grad_value[0], span, torch.bmm(weight.transpose(1, 2), g))
        return _by_head(grad_queries)[None] * ctx.scaling, grad_key, grad_value, None, None, None


def _by_token(states: Tensor, kv_heads: int) -> Tensor:
    """states (H, S, head_dim) -> (KVH, S, G, head_dim), contiguous."""
    return states.view(kv_heads, -1, *states.shape[1:]).transpose(1, 2).contiguous()


def _by_head(states: Tensor) -> Tensor:
    """states (KVH, S, G, head_dim) -> (H, S, head_dim), with a token's heads side by side for the model's linears."""
    by_token = states.transpose(0, 1).flatten(1, 2)  # (S, H, head_dim)
    return by_token.transpose(0, 1)


def _own(states: Tensor, segment: Segment) -> Tensor:
    """states (KVH, S, G, head_dim) -> the segment's (KVH, n * G, head_dim), a view."""
    return states[:, segment.start : segment.stop].flatten(1, 2)


def _context(states: Tensor, segment: Segment) -> Tensor:
    """states (KVH, S, head_dim) -> (KVH, c, head_dim): the segment's prefix and its own."""
    own = states[:, segment.start : segment.stop]
    if not segment.prefix_length:
        return own
    return torch.cat((states[:, segment.prefix_start : segment.prefix_stop], own), dim=1)


def _add_context(states: Tensor, segment: Segment, values: Tensor) -> None:
    """Add values (KVH, c, head_dim) where `_context` read."""
    if segment.prefix_length:
        states[:, segment.prefix_start : segment.prefix_stop] += values[:, : segment.prefix_length]
    states[:, segment.start : segment.stop] += values[:, segment.prefix_length :]


def _runs(segments: Sequence[Segment], limit: int) -> list[list[Segment]]:
    """Runs of segments after the same prefix, or after none, of at most `limit` tokens unless a segment has more."""
    runs: list[list[Segment]] = []
    for segment in segments:
        first = runs[-1][0] if runs else segment
        alike = (segment.prefix_start, segment.prefix_stop) == (first.prefix_start, first.prefix_stop)
        if runs and alike and segment.stop - first.start <= limit:
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _span(run: Sequence[Segment]) -> Segment:
    return replace(run[0], stop=run[-1].stop)


def _block_mask(run: Sequence[Segment], window: int | None, groups: int, like: Tensor) -> Tensor:
    """0 where a token of the run's segments may look and -inf elsewhere, (n * G, c)."""
    visible = torch.zeros((_span(run).length, _span(run).context), dtype=torch.bool)
    prefix = run[0].prefix_length
    for segment in run:
        rows = slice(segment.start - run[0].start, segment.stop - run[0].start)
        own = _visible(torch.tensor([prefix]), segment.length, segment.context, window)[0]
        visible[rows, :prefix] = own[:, :prefix]
        visible[rows, prefix + rows.start : prefix + rows.stop] = own[:, prefix:]
    hidden = ~visible.to(like.device).repeat_interleave(groups, 0)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _visible(prefixes: Tensor, length: int, context: int, window: int | None) -> Tensor:
    """(R, n, c): whether a segment's token, after a prefix of prefixes (R,) tokens, may look at a token."""
    positions = torch.arange(context)
    queries = prefixes[:, None, None] + torch.arange(length)[:, None]
    visible = positions <= queries
    if window is not None:
        visible &= positions > queries - window
    return visible


def _padded(places: Sequence[int], length: int) -> list[int]:
    return [*places, *[places[-1]] * (length - len(places))]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extras: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls by NAME."""
    refuse_extras(extras)
    layout = _in_force.layout
    layout.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = attend_blocks if query.device.type == "cpu" else attend_rows
    return attend(query, key, value, scale, sliding_window, layout), None
