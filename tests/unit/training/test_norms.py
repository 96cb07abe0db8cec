from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from server.training.norms import KNOWN_NORMS, NormSwitch, rms_norm


def _norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(24, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.rand(24) + 0.5)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN_NORMS)
def test_values_and_gradients_are_those_of_every_known_norm(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = _norm(kind, dtype)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 24, dtype=dtype)
    ours, theirs = rms_norm(x, norm.weight, 1e-3), norm(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    (mine,), (reference,) = (torch.autograd.grad(out, x, grad) for out in (ours, theirs))
    torch.testing.assert_close(mine, reference)


def test_the_gradient_holds_for_inputs_of_any_size() -> None:
    weight = torch.ones(24)
    for size in (1e-6, 1.0, 1e4):
        x = (size * torch.randn(3, 24)).requires_grad_()
        (gradient,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), x)
        exact = x.detach().double().requires_grad_()
        reference = torch.autograd.grad((exact * (exact.square().mean(-1, True) + 1e-5).rsqrt()).sum(), exact)[0]
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-3, atol=1e-6)


def test_a_models_norms_are_switched_and_switched_back_also_after_an_error() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
    norms = [module for module in model.modules() if isinstance(module, KNOWN_NORMS)]
    assert len(norms) == 5

    def fail_inside() -> None:
        with NormSwitch(model).engaged():
            assert all("forward" in vars(norm) for norm in norms)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert not any("forward" in vars(norm) for norm in norms)


def test_norms_of_another_kind_stay_as_they_are() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=16))
    with NormSwitch(model).engaged():
        assert not any("forward" in vars(module) for module in model.modules())
