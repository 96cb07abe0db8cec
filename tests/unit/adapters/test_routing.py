from __future__ import annotations

import pytest
import torch
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from server.adapters.routing import (
    fresh_routing,
    one_hot_routing,
    routing_logits,
    routing_weights,
    sample_routing_weights,
)


def test_weights_are_sigmoids_normalised_over_the_skills() -> None:
    logits = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = torch.sigmoid(logits)
    torch.testing.assert_close(routing_weights(logits), scores / scores.sum(-1, keepdim=True))


def test_weights_are_no_softmax() -> None:
    weights = routing_weights(torch.tensor([0.0, 2.0]))
    torch.testing.assert_close(weights[1] / weights[0], 2 * torch.sigmoid(torch.tensor(2.0)))


def test_zero_logits_give_uniform_weights() -> None:
    assert routing_weights(torch.zeros(2, 3, 8)).eq(1 / 8).all()


@pytest.mark.parametrize("weights", [[0.7, 0.2, 0.1, 0.0], [1.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.2, 0.2]])
def test_logits_of_weights_give_them_back(weights: list[float]) -> None:
    logits = routing_logits(torch.tensor(weights))
    torch.testing.assert_close(routing_weights(logits), torch.tensor(weights))


def test_even_weights_have_logits_of_zero() -> None:
    assert routing_logits(torch.full((2, 8), 1 / 8)).eq(0).all()


def test_very_negative_logits_stay_finite() -> None:
    logits = torch.full((1, 4), -200.0, requires_grad=True)
    weights = routing_weights(logits)
    weights.sum().backward()
    assert weights.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_one_hot_weights_are_exact_also_after_a_cast_to_fp16() -> None:
    logits = one_hot_routing(3, 2, 4, skill=1)
    expected = torch.zeros(3, 2, 4)
    expected[:, :, 1] = 1
    assert torch.equal(routing_weights(logits), expected)
    assert torch.equal(routing_weights(logits.half().float()), expected)


def test_fresh_routing_is_close_to_the_mean_and_reproducible() -> None:
    first = fresh_routing(3, 2, 4, torch.Generator().manual_seed(5))
    assert first.shape == (3, 2, 4)
    assert first.abs().max() <= 1e-3
    assert first.unique().numel() == first.numel()
    assert torch.equal(first, fresh_routing(3, 2, 4, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_noisy_scores_have_the_mean_of_a_relaxed_bernoulli(logit: float) -> None:
    # With a second skill that is certainly on (score 1), the score can be read off the normalised weights.
    logits = torch.tensor([logit, 100.0]).expand(200_000, 2)
    weights = sample_routing_weights(logits, torch.Generator().manual_seed(0))
    scores = weights[:, 0] / weights[:, 1]
    torch.manual_seed(0)
    reference = RelaxedBernoulli(torch.tensor(1.0), logits=torch.tensor(logit)).sample((200_000,))
    assert scores.mean().item() == pytest.approx(reference.mean().item(), abs=0.005)
    assert scores.std().item() == pytest.approx(reference.std().item(), abs=0.005)
    torch.testing.assert_close(weights.sum(-1), torch.ones(200_000))


def test_equal_logits_are_noisy_around_equal_weights() -> None:
    weights = sample_routing_weights(torch.zeros(100_000, 4), torch.Generator().manual_seed(0))
    assert weights.std() > 0.05
    torch.testing.assert_close(weights.mean(0), torch.full((4,), 0.25), atol=0.003, rtol=0)


def test_noise_comes_from_the_generator_and_lets_gradients_through() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    first = sample_routing_weights(logits, torch.Generator().manual_seed(1))
    again = sample_routing_weights(logits, torch.Generator().manual_seed(1))
    other = sample_routing_weights(logits, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first[0, 0].backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] > 0
