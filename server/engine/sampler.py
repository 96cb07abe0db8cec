"""From logits to tokens, the whole batch at once.

Letters: S sampled rows, V vocabulary, n rows that draw at random, C candidates kept of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import Sequence as RequestState
from server.engine.request import TokenLogprob

_CANDIDATES = 1024  # sorted first; the whole vocabulary is sorted only where they are not enough
_BROKEN = -1


@dataclass(frozen=True)
class Choice:
    """The token chosen for one row; None when the row's logits are not finite."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses tokens. A row's choice depends on its own logits and its own sequence alone."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = sorted(eos_token_ids)

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Sequence[RequestState]) -> list[Choice]:
        """One choice per row of logits (S, V); row i belongs to sequences[i]. The logits are not kept intact."""
        if not sequences:
            return []
        asked = [row for row, s in enumerate(sequences) if s.request.sampling.logprobs is not None]
        logprobs = torch.log_softmax(logits[asked], dim=-1) if asked else None  # (len(asked), V), before adjustments
        self._forbid_early_end(logits, sequences)
        _penalise_repetition(logits, sequences)
        best = logits.max(dim=-1)
        tokens = best.indices
        drawing = [row for row, s in enumerate(sequences) if not s.request.sampling.greedy]
        if drawing:
            tokens[drawing] = _draw(logits[drawing], [sequences[row] for row in drawing])
        token_ids: list[int] = torch.where(best.values.isfinite(), tokens, _BROKEN).tolist()
        choices = [Choice(None if token == _BROKEN else token) for token in token_ids]
        if logprobs is not None:
            wanted = [(row, sequences[row].request.sampling.logprobs or 0) for row in asked]
            for (row, _), choice in zip(wanted, _with_logprobs(logprobs, token_ids, wanted), strict=True):
                choices[row] = choice
        return choices

    def _forbid_early_end(self, logits: Tensor, sequences: Sequence[RequestState]) -> None:
        rows = [r for r, s in enumerate(sequences) if s.num_generated_tokens < s.request.sampling.min_new_tokens]
        if rows and self._eos:
            index = torch.tensor(rows, device=logits.device)[:, None]
            logits[index, torch.tensor(self._eos, device=logits.device)] = float("-inf")


@torch.inference_mode()
def score(logits: Tensor, targets: Sequence[int]) -> list[float]:
    """The log-probability of targets[i] by row i of logits (len(targets), V)."""
    if not targets:
        return []
    index = torch.tensor(targets, device=logits.device)[:, None]
    scores: list[float] = torch.log_softmax(logits, dim=-1).gather(1, index)[:, 0].tolist()
    return scores


def _penalise_repetition(logits: Tensor, sequences: Sequence[RequestState]) -> None:
    """Divide the positive logits, and multiply the negative ones, of tokens that a sequence holds already."""
    rows: list[int] = []
    tokens: list[int] = []
    penalties: list[float] = []
    for row, sequence in enumerate(sequences):
        penalty = sequence.request.sampling.repetition_penalty
        if penalty != 1.0:
            seen = set(sequence.token_ids)
            rows += [row] * len(seen)
            tokens += seen
            penalties += [penalty] * len(seen)
    if rows:
        place = (torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device))
        factor = torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
        values = logits[place]
        logits[place] = torch.where(values < 0, values * factor, values / factor)


def _draw(logits: Tensor, sequences: Sequence[RequestState]) -> Tensor:
    """One random token (n,) per row of logits (n, V), by inverting the cumulated distribution.

    Every sequence supplies one uniform number of its own, so a seed gives the same tokens in any batch. Temperature
    comes first, then top_k, top_p and min_p, each over what the one before left, as in transformers.
    """
    params = [s.request.sampling for s in sequences]
    vocabulary = logits.shape[1]
    columns = torch.tensor(
        [
            [p.temperature for p in params],
            [p.top_p for p in params],
            [p.min_p for p in params],
            [float(min(p.top_k or vocabulary, vocabulary)) for p in params],
            [s.random.random() for s in sequences],
        ],
        dtype=torch.float64,
        device=logits.device,
    )
    temperature, top_p, min_p, top_k, uniform = columns[:, :, None].unbind(0)  # (n, 1) each
    probs = torch.softmax(logits.double() / temperature, dim=-1)  # (n, V)
    if all(p.top_p == 1 and p.min_p == 0 and p.top_k == 0 for p in params):
        return _invert(probs.cumsum(dim=-1), probs.new_full(uniform.shape, vocabulary), uniform)
    enough = vocabulary if logits.is_cuda else min(vocabulary, max(_CANDIDATES, *(p.top_k for p in params)))
    for count in dict.fromkeys((enough, vocabulary)):
        sorted_probs, order = probs.topk(count, dim=-1)  # (n, C), likeliest first
        cumulated = sorted_probs.cumsum(dim=-1)
        kept = _nucleus(sorted_probs, cumulated, top_k, top_p, min_p)
        if count == vocabulary or not kept[:, -1].any():
            break
    return order.gather(1, _invert(cumulated, kept.sum(dim=-1, keepdim=True), uniform)[:, None])[:, 0]


def _nucleus(probs: Tensor, cumulated: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which of the sorted candidates (n, C) each row keeps; always a prefix. One that keeps all may need more."""
    rank = torch.arange(probs.shape[1], device=probs.device)
    last = (top_k.long() - 1).clamp(max=probs.shape[1] - 1)
    whole = torch.where(top_k <= probs.shape[1], cumulated.gather(1, last), 1.0)  # (n, 1) mass left by top_k
    before = cumulated - probs
    kept = (rank < top_k) & (before < top_p * whole) & (probs >= min_p * probs[:, :1])
    kept[:, 0] = True
    return kept


def _invert(cumulated: Tensor, keep: Tensor, uniform: Tensor) -> Tensor:
    """The first place (n,) where the cumulated mass (n, C) of the first `keep` (n, 1) exceeds its uniform share."""
    total = cumulated.gather(1, keep.long() - 1)
    place = torch.searchsorted(cumulated, uniform * total, right=True)
    return torch.minimum(place, keep.long() - 1)[:, 0]


def _with_logprobs(logprobs: Tensor, token_ids: Sequence[int], wanted: Sequence[tuple[int, int]]) -> list[Choice]:
    """Choices for the rows (row, number of alternatives) that asked; logprobs (len(wanted), V) are theirs."""
    chosen = torch.tensor([max(token_ids[row], 0) for row, _ in wanted], device=logprobs.device)
    own: list[float] = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
    top = logprobs.topk(max(1, *(count for _, count in wanted)) if len(wanted) > 1 else max(1, wanted[0][1]), dim=-1)
    values, indices = top.values.tolist(), top.indices.tolist()
    return [
        Choice(None)
        if token_ids[row] == _BROKEN
        else Choice(
            token_ids[row],
            own[i],
            tuple(TokenLogprob(t, v) for t, v in zip(indices[i][:count], values[i][:count], strict=True)),
        )
        for i, (row, count) in enumerate(wanted)
    ]
