"""Which models the engine can serve exactly, as far as their configuration tells."""

from __future__ import annotations

from transformers import PreTrainedConfig

from server.errors import InvalidInput

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_ROPE_BY_LENGTH = {"dynamic", "longrope"}  # these rotate a token by what else is in the batch


def check_config(config: PreTrainedConfig, max_context: int) -> None:
    """Raise InvalidInput, with the remedy, when a model of this configuration cannot be served exactly."""
    name = config.model_type
    if config.is_encoder_decoder:
        raise InvalidInput(f"the backbone ({name}) is an encoder-decoder; choose a decoder-only model")
    other_layers = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other_layers or getattr(config, "attention_chunk_size", None):
        layers = sorted(other_layers) or ["chunked_attention"]
        raise InvalidInput(f"the backbone ({name}) has layers that this engine cannot compute: {', '.join(layers)}")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max_context > limit:
        raise InvalidInput(
            f"max_context is {max_context}, the backbone ({name}) knows {limit} positions; lower max_context",
            param="max_context",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or limit
    if rope.get("rope_type") in _ROPE_BY_LENGTH and original is not None and max_context > original:
        raise InvalidInput(
            f"the backbone ({name}) changes its position encoding beyond {original} tokens, so answers would depend "
            f"on the batch; lower max_context from {max_context} to {original}",
            param="max_context",
        )
