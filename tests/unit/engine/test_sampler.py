"""Sampling against transformers' own logits processors, and its independence of the batch."""

from __future__ import annotations

import collections

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import sampler as sampler_module
from server.engine.request import EngineRequest, SamplingParams, Sequence
from server.engine.sampler import Sampler, score

VOCAB = 50


def sequence(prompt: tuple[int, ...] = (1, 2, 3), **sampling: object) -> Sequence:
    return Sequence(EngineRequest("r", "t", prompt, SamplingParams(**sampling)), arrival_s=0.0)


def draw(logits: torch.Tensor, sequences: list[Sequence], eos: tuple[int, ...] = ()) -> list[int | None]:
    return [choice.token_id for choice in Sampler(frozenset(eos)).sample(logits.clone(), sequences)]


def expected_distribution(logits: torch.Tensor, params: SamplingParams, prompt: tuple[int, ...]) -> torch.Tensor:
    """By transformers' own processors, in generate's order."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.tensor([prompt]), logits[None].double().clone())[0].softmax(-1)


@pytest.mark.parametrize("candidates", [4, 1024])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.3, "top_p": 0.05},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.7},
    ],
)
def test_draws_follow_the_distribution_of_transformers(
    sampling: dict[str, float], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_CANDIDATES", candidates)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    own = sequence(seed=7, **sampling)
    wanted = expected_distribution(logits, own.request.sampling, own.request.prompt_token_ids)
    rounds, rows = 30, 300
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    for _ in range(rounds):
        tokens = draw(logits.expand(rows, VOCAB), [own] * rows)
        counts += torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    seen = counts / counts.sum()
    assert not seen[wanted == 0].any(), "a token was drawn that the filters exclude"
    assert (seen - wanted).abs().max() < 0.02


def test_greedy_takes_the_likeliest_token() -> None:
    logits = torch.randn(6, VOCAB)
    assert draw(logits, [sequence() for _ in range(6)]) == logits.argmax(-1).tolist()


def test_greedy_repetition_penalty_equals_transformers() -> None:
    logits = torch.randn(8, VOCAB)
    prompts = [tuple(torch.randint(0, VOCAB, (20,)).tolist()) for _ in range(8)]
    expected = [
        RepetitionPenaltyLogitsProcessor(2.5)(torch.tensor([p]), row[None].clone())[0].argmax().item()
        for p, row in zip(prompts, logits, strict=True)
    ]
    assert draw(logits, [sequence(p, repetition_penalty=2.5) for p in prompts]) == expected


def test_a_seed_gives_the_same_tokens_in_any_batch() -> None:
    logits = torch.randn(12, VOCAB)
    alone = sequence(temperature=1.0, top_p=0.9, seed=11)
    expected = [draw(row[None], [alone])[0] for row in logits]
    crowded = sequence(temperature=1.0, top_p=0.9, seed=11)
    others = [sequence(temperature=0.5 + n, seed=n) for n in range(5)] + [sequence()]
    found = [draw(torch.cat([torch.randn(6, VOCAB), row[None]]), [*others, crowded])[-1] for row in logits]
    assert found == expected
    assert len(set(expected)) > 3


def test_unseeded_sequences_differ() -> None:
    logits = torch.zeros(40, VOCAB)
    assert len(set(draw(logits, [sequence(temperature=1.0) for _ in range(40)]))) > 10


def test_greedy_rows_are_untouched_by_drawing_neighbours() -> None:
    logits = torch.randn(3, VOCAB)
    tokens = draw(logits, [sequence(), sequence(temperature=5.0, seed=1), sequence()])
    assert [tokens[0], tokens[2]] == [logits[0].argmax().item(), logits[2].argmax().item()]


def test_the_end_of_text_is_not_chosen_before_min_new_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 9] = 10.0, 9.0
    short = sequence(min_new_tokens=2)
    assert draw(logits, [short], eos=(5,)) == [9]
    short.token_ids += [9, 9]
    assert draw(logits, [short], eos=(5,)) == [5]


def test_logprobs_are_the_models_own_and_only_for_those_who_asked() -> None:
    logits = torch.randn(4, VOCAB)
    sequences = [
        sequence(),
        sequence(logprobs=0, repetition_penalty=3.0),
        sequence(logprobs=3, temperature=2.0, seed=1),
        sequence(logprobs=1),
    ]
    expected = logits.log_softmax(-1)
    choices = Sampler(frozenset()).sample(logits.clone(), sequences)
    assert choices[0].logprob is None
    for row, count in ((1, 0), (2, 3), (3, 1)):
        choice = choices[row]
        assert choice.token_id is not None
        assert choice.logprob == pytest.approx(expected[row, choice.token_id].item(), abs=1e-5)
        top = expected[row].topk(count)
        assert [t.token_id for t in choice.top_logprobs] == top.indices.tolist()
        assert [t.logprob for t in choice.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"logprobs": 2}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_row_that_is_not_finite_is_told_apart_and_spoils_no_other(value: float, sampling: dict[str, float]) -> None:
    logits = torch.randn(3, VOCAB)
    expected = logits.argmax(-1).tolist()
    logits[1, 4] = value
    tokens = draw(logits, [sequence(), sequence(**sampling), sequence()])
    assert tokens == [expected[0], None, expected[2]]


def test_scores_are_log_probabilities_of_their_targets() -> None:
    logits = torch.randn(5, VOCAB)
    targets = [3, 4, 3, 0, 49]
    expected = logits.log_softmax(-1)[torch.arange(5), torch.tensor(targets)]
    assert score(logits, targets) == pytest.approx(expected.tolist(), abs=1e-6)
    assert score(torch.empty(0, VOCAB), []) == []


def test_nothing_to_sample_is_no_choice() -> None:
    assert Sampler(frozenset()).sample(torch.empty(0, VOCAB), []) == []


def test_a_uniform_row_without_filters_reaches_the_whole_vocabulary() -> None:
    own = sequence(temperature=1.0, seed=3)
    counts = collections.Counter(draw(torch.zeros(3000, VOCAB), [own] * 3000))
    assert set(counts) == set(range(VOCAB))
