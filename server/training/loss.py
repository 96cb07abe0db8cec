"""What training makes smaller: the negative log-likelihood of the answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdapterContext
from server.adapters.task_rows import TaskRows
from server.training.attention import PackedAttention
from server.training.batches import Batch


def answer_loss(
    model: PreTrainedModel,
    context: AdapterContext,
    attention: PackedAttention,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    batch: Batch,
) -> Tensor:
    """Mean negative log-likelihood of a batch's answers, in nats: over a sequence's tokens, then over sequences.

    `adapters` {linear: A (N, d_in, r), B (N, r, d_out)} are those of batch.tasks (N may be 1 for all tasks).
    """
    with context.use(TaskRows(adapters, batch.lengths)), attention.use(batch.segments):
        states: Tensor = model.base_model(
            input_ids=batch.tokens[None], position_ids=batch.position_ids[None], use_cache=False
        )[0]  # (1, S, d)
    # Logits only where the loss reads them: over all tokens they would cost a quarter of what the layers do.
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits: Tensor = head(states[0].index_select(0, batch.answers))  # (P, vocabulary)
    losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
    return (losses * batch.weights).sum()
