from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM as Auto
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig

from server.errors import InvalidInput
from server.training.attention import _attention, causal_attention, training_attention

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_equals_torchs_own_attention_and_its_gradients(heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.randn((2, n, 7, 5), generator=generator, requires_grad=True)

    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    ours = causal_attention(query, key, value, 0.3)
    theirs = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    inputs = (query, key, value)
    for mine, reference in zip(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("config", [LlamaConfig(**_SMALL), MistralConfig(**_SMALL, sliding_window=5)])
def test_a_model_gives_the_same_states_switched(config: LlamaConfig | MistralConfig) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(config).eval()
    _same_states(model)


def test_gpt2_gives_the_same_states_switched() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=64)).eval()
    _same_states(model)


def _same_states(model: torch.nn.Module) -> None:
    tokens = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(1))
    switch = training_attention(model)
    assert switch is not None
    with torch.no_grad():
        own = model.base_model(input_ids=tokens, use_cache=False)[0]
        with switch.engaged():
            ours = model.base_model(input_ids=tokens, use_cache=False)[0]
        again = model.base_model(input_ids=tokens, use_cache=False)[0]
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)
    assert torch.equal(own, again)


def test_an_attention_that_it_cannot_compute_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(InvalidInput, match="'softcap'"):
        _attention(torch.nn.Linear(1, 1), states, states, states, None, softcap=30.0)
