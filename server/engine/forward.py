"""One forward pass of a step: by the transformers model's own modules, or by compiled operators between its products.

Letters: N rows of a step, S rows whose logits are needed, d numbers of a hidden state.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdapterContext
from server.engine.attention import CachedAttention, switch_to_cache
from server.engine.batch import Batch


class Forward(Protocol):
    """Computes steps over the cache of one `CachedAttention`."""

    def __call__(self, batch: Batch) -> Tensor:
        """The logits (S, vocabulary) of the batch's logit rows, in the model's type."""
        ...


class ModelForward:
    """The model's own modules, with the linears' adapters and the attention switched in: serves any model."""

    def __init__(self, model: PreTrainedModel, context: AdapterContext, attention: CachedAttention) -> None:
        self._model = model
        self._context = context
        self._attention = attention
        self._switch = switch_to_cache(model, attention)

    def __call__(self, batch: Batch) -> Tensor:
        """See `Forward`."""
        with self._context.use(batch.mix), self._attention.use(batch.attention), self._switch.engaged():
            output = self._model(
                input_ids=batch.token_ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.logit_rows,
            )
        logits: Tensor = output.logits
        return logits[0]
