"""What training looks at: the answers of a batch, how likely the model finds them and which it would choose."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from server.adapters.adapted_linear import AdapterContext
from server.adapters.task_rows import TaskRows
from server.training.attention import PackedAttention
from server.training.batches import Batch


def answer_logits(
    model: PreTrainedModel,
    context: AdapterContext,
    attention: PackedAttention,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    batch: Batch,
) -> Tensor:
    """Logits (P, vocabulary) in fp32 at the P places whose next token is an answer's.

    `adapters` {linear: A (N, d_in, r), B (N, r, d_out)} are those of batch.tasks (N may be 1 for all tasks).
    """
    with context.use(TaskRows(adapters, batch.lengths)), attention.use(batch.segments):
        states: Tensor = model.base_model(
            input_ids=batch.tokens[None], position_ids=batch.position_ids[None], use_cache=False
        )[0]  # (1, S, d)
    # Logits only where the loss reads them: over all tokens they would cost a quarter of what the layers do.
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits: Tensor = head(states[0].index_select(0, batch.answers))
    return logits.float()


def answer_losses(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) negative log-likelihood of each sequence's answer, in nats per token."""
    return batch.mean_by_sequence(F.cross_entropy(logits, batch.targets, reduction="none"))


def answer_accuracies(logits: Tensor, batch: Batch) -> Tensor:
    """(B,) the share of each answer's tokens that have the highest logit."""
    return batch.mean_by_sequence((logits.argmax(dim=-1) == batch.targets).float())
