"""Making a transformers model use an attention function of ours for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel


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
