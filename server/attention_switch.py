"""Making a transformers model use an attention function of ours for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel

from server.errors import InvalidInput

_HARMLESS = {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "cache_position"}


class AttentionSwitch:
    """Switches one model to the attention function registered under a name, and back.

    No mask function is registered under that name, so a switched model builds no masks.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        configs = [getattr(module, "config", None) for module in model.modules()]
        self._configs = list({id(c): c for c in configs if isinstance(c, PreTrainedConfig)}.values())
        self._name = name

    @contextmanager
    def engaged(self) -> Iterator[None]:
        """The model uses the named function inside, and its own attention afterwards."""
        before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = self._name
        try:
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation = implementation


def refuse_extras(extras: Mapping[str, object]) -> None:
    """Raise InvalidInput when a model passes its attention something that changes the result and ours ignore."""
    for name, value in extras.items():
        if value is not None and name not in _HARMLESS:
            raise InvalidInput(
                f"the backbone's attention uses {name!r}, which this server cannot compute; choose another backbone"
            )
