"""Attention over our own key-value cache, called by a transformers model's own modules.

transformers looks an attention function up by name and passes it the module that asks. Ours finds the step's batch
through an attribute of that module, set once by the runner that owns the model.

Letters: N rows of a step, D of them decode rows, H query heads, G = H / KVH of them per key-value head,
S cache slots, C = max_context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from server.attention_switch import AttentionSwitch, refuse_extras
from server.engine.attention_operator import AttentionOperator
from server.engine.batch import AttentionBatch, DecodeRun, PrefillRows
from server.memory import lazy_zeros

NAME = "mhr_cached"
_OWNER = "mhr_cached_attention"

MaskKey = tuple[object, int | None]


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    keys: Tensor  # (S, C, KVH, head_dim)
    values: Tensor  # (S, C, KVH, head_dim)


class CachedAttention:
    """Keys and values of all sequences, and the attention of one step over them.

    A layer's cache is made when the layer first runs, in the sizes that it asks for. With an `operator` the model
    must be on CPU in fp32.
    """

    def __init__(self, num_slots: int, max_context: int, operator: AttentionOperator | None = None) -> None:
        self._num_slots = num_slots
        self._max_context = max_context
        self._operator = operator
        self._layers: dict[int, LayerCache] = {}
        self._batch: AttentionBatch | None = None
        self._masks: dict[MaskKey, Tensor] = {}  # of the batch in force, shared by its layers

    @contextmanager
    def use(self, batch: AttentionBatch) -> Iterator[None]:
        """Put a step's batch in force."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None
            self._masks.clear()

    @property
    def layers(self) -> list[LayerCache]:
        """The caches of the layers that have run."""
        return list(self._layers.values())

    def clear(self, slot: int, num_tokens: int) -> None:
        """Zero the first tokens of a slot, so that numbers gone wrong cannot reach its next owner."""
        for layer in self._layers.values():
            layer.keys[slot, :num_tokens].zero_()
            layer.values[slot, :num_tokens].zero_()

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """query (1, H, N, head_dim), key and value (1, KVH, N, head_dim) -> (1, N, H, head_dim)."""
        batch = self._batch
        assert batch is not None, "the model runs outside of a step"
        cache = self._layers.get(layer_idx)
        if cache is None:
            cache = self._layers[layer_idx] = self._make_layer(key, value)
        if window is not None and window >= self._max_context:
            window = None
        query, key, value = query[0], key[0], value[0]
        if self._operator is None or key.shape != value.shape:  # the operator reads keys and values of one size
            self._keep(cache, key, value, 0)
            parts = [self._decode(cache, query, scaling, window)] if batch.runs else []
        else:
            places = batch.cache_rows[: batch.num_decode]
            attend = self._operator.attend  # which keeps the new tokens, too
            parts = [attend(cache.keys, cache.values, query, key, value, places, scaling, window)] if batch.runs else []
            self._keep(cache, key, value, batch.num_decode)
        parts += [self._prefill(cache, query, segment, scaling, window) for segment in batch.prefill]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _keep(self, cache: LayerCache, key: Tensor, value: Tensor, first: int) -> None:
        """Put the rows of key and value (KVH, N, head_dim) from `first` on into the cache."""
        assert self._batch is not None
        places = self._batch.cache_rows[first:]
        if len(places):
            cache.keys.flatten(0, 1).index_copy_(0, places, key[:, first:].transpose(0, 1))
            cache.values.flatten(0, 1).index_copy_(0, places, value[:, first:].transpose(0, 1))

    def _make_layer(self, key: Tensor, value: Tensor) -> LayerCache:
        def zeros(like: Tensor) -> Tensor:
            shape = (self._num_slots, self._max_context, like.shape[1], like.shape[3])
            return lazy_zeros(shape, like.dtype, like.device)

        return LayerCache(zeros(key), zeros(value))

    def _decode(self, cache: LayerCache, query: Tensor, scaling: float, window: int | None) -> Tensor:
        """query (H, N, head_dim), the decode rows first -> (D, H, head_dim)."""
        batch = self._batch
        assert batch is not None
        query = query[:, : batch.num_decode].transpose(0, 1)  # (D, H, head_dim)
        if batch.to_slot_order is not None:
            query = query.index_select(0, batch.to_slot_order)
        outs = [self._decode_run(cache, query[run.start : run.stop], run, scaling, window) for run in batch.runs]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out if batch.to_row_order is None else out.index_select(0, batch.to_row_order)

    def _decode_run(
        self, cache: LayerCache, query: Tensor, run: DecodeRun, scaling: float, window: int | None
    ) -> Tensor:
        """query (b, H, head_dim) of sequences in neighbouring slots -> (b, H, head_dim).

        The G query heads of one key-value head stand as G queries, so that keys and values are not repeated.
        """
        slots = slice(run.first_slot, run.first_slot + run.stop - run.start)
        keys = cache.keys[slots, : run.context].transpose(1, 2)  # (b, KVH, context, head_dim)
        values = cache.values[slots, : run.context].transpose(1, 2)
        rows, num_heads, head_dim = query.shape
        grouped = query.reshape(rows, keys.shape[1], -1, head_dim)  # (b, KVH, G, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=self._decode_mask(run, query, window), scale=scaling
        )
        return out.reshape(rows, num_heads, -1)

    def _prefill(
        self, cache: LayerCache, query: Tensor, segment: PrefillRows, scaling: float, window: int | None
    ) -> Tensor:
        """query (H, N, head_dim) -> the segment's (stop - start, H, head_dim)."""
        keys = cache.keys[segment.slot, : segment.context].transpose(0, 1)[None]  # (1, KVH, context, head_dim)
        values = cache.values[segment.slot, : segment.context].transpose(0, 1)[None]
        mask = self._prefill_mask(segment, query, window)
        out = F.scaled_dot_product_attention(
            query[None, :, segment.start : segment.stop],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def _decode_mask(self, run: DecodeRun, query: Tensor, window: int | None) -> Tensor | None:
        """0 where a sequence may look and -inf elsewhere, (b, 1, 1, context); None when all may look everywhere."""
        windowed = window is not None and run.context > window
        if run.lengths is None and not windowed:
            return None
        key = (run.first_slot, window)
        if key not in self._masks:
            rows = run.stop - run.start
            positions = torch.arange(run.context, device=query.device)
            lengths = positions.new_full((rows,), run.context) if run.lengths is None else run.lengths
            allowed = positions < lengths[:, None]
            if window is not None:
                allowed &= positions >= lengths[:, None] - window
            self._masks[key] = _additive(allowed, query.dtype)[:, None, None]
        return self._masks[key]

    def _prefill_mask(self, segment: PrefillRows, query: Tensor, window: int | None) -> Tensor | None:
        """Causal mask (rows, context); None when the segment begins its sequence and plain causality is enough."""
        if segment.first_position == 0 and (window is None or segment.context <= window):
            return None
        key = (segment, window)
        if key not in self._masks:
            positions = torch.arange(segment.context, device=query.device)
            queries = positions[segment.first_position :, None]
            allowed = positions <= queries
            if window is not None:
                allowed &= positions > queries - window
            self._masks[key] = _additive(allowed, query.dtype)
        return self._masks[key]


def switch_to_cache(model: PreTrainedModel, attention: CachedAttention) -> AttentionSwitch:
    """A switch that makes the model's modules use `attention`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _cached_attention)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _OWNER, attention)
    return AttentionSwitch(model, NAME)


def _cached_attention(
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
    attention: CachedAttention = getattr(module, _OWNER)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx: int = module.layer_idx  # type: ignore[assignment]  # nn.Module types its attributes as tensors
    return attention.attend(layer_idx, query, key, value, scale, sliding_window), None


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
