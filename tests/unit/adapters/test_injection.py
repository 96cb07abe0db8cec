from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from server.adapters.adapted_linear import AdaptedLinear
from server.adapters.injection import check_fits, check_sizes, inject, linear_sizes
from server.adapters.task_rows import TaskRows
from server.errors import InvalidInput

TOKENS = torch.tensor([[1, 5, 9, 2], [4, 4, 7, 3]])


def random_mix(sizes: dict[str, tuple[int, int]], lengths: list[int], rank: int = 2) -> TaskRows:
    torch.manual_seed(1)
    pairs = {
        name: (0.3 * torch.randn(len(lengths), d_in, rank), 0.3 * torch.randn(len(lengths), rank, d_out))
        for name, (d_in, d_out) in sizes.items()
    }
    return TaskRows(pairs, lengths)


def merged_logits(model: PreTrainedModel, mix: TaskRows, task: int, tokens: torch.Tensor) -> torch.Tensor:
    """What a copy of the bare model says with the task's adapter added to its weights."""
    merged = copy.deepcopy(model)
    for name, (A, B) in mix.adapters.items():
        module = merged.get_submodule(name)
        delta = A[task] @ B[task]
        module.weight.data += delta.T if isinstance(module, nn.Linear) else delta
    return merged(tokens).logits


def test_linears_of_a_llama_and_their_sizes(small_llama: LlamaForCausalLM) -> None:
    sizes = linear_sizes(small_llama)
    assert len(sizes) == 2 * 7
    assert sizes["model.layers.0.self_attn.q_proj"] == (32, 32)
    assert sizes["model.layers.1.self_attn.v_proj"] == (32, 16)
    assert sizes["model.layers.1.mlp.down_proj"] == (48, 32)
    assert not any("lm_head" in name for name in sizes)


def test_linears_of_a_gpt2_and_their_sizes(small_gpt2: GPT2LMHeadModel) -> None:
    sizes = linear_sizes(small_gpt2)
    assert len(sizes) == 2 * 4
    assert sizes["transformer.h.0.attn.c_attn"] == (32, 96)
    assert sizes["transformer.h.1.mlp.c_fc"] == (32, 128)


@pytest.mark.parametrize("name", ["small_llama", "small_gpt2"])
@torch.no_grad()
def test_injected_model_serves_each_row_its_own_adapter(name: str, request: pytest.FixtureRequest) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    sizes = linear_sizes(model)
    mix = random_mix(sizes, lengths=[4, 4])
    bare = model(TOKENS).logits
    expected = [merged_logits(model, mix, task, TOKENS[row : row + 1]) for row, task in ((0, 0), (1, 1))]
    context = inject(model)
    assert torch.equal(model(TOKENS).logits, bare)
    with context.use(mix):
        adapted = model(TOKENS).logits
    torch.testing.assert_close(adapted, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(adapted, bare, atol=1e-2)
    assert torch.equal(model(TOKENS).logits, bare)


def test_injection_wraps_every_linear_once_and_freezes_the_model(small_llama: LlamaForCausalLM) -> None:
    before = linear_sizes(small_llama)
    context = inject(small_llama)
    assert inject(small_llama) is context
    wrapped = {m.linear for m in small_llama.modules() if isinstance(m, AdaptedLinear)}
    assert wrapped == set(before)
    assert linear_sizes(small_llama) == before
    assert not any(parameter.requires_grad for parameter in small_llama.parameters())
    assert not any(isinstance(m.base, AdaptedLinear) for m in small_llama.modules() if isinstance(m, AdaptedLinear))


def test_wanted_selects_linears(small_llama: LlamaForCausalLM) -> None:
    sizes = linear_sizes(small_llama, lambda name: name.endswith("q_proj"))
    assert list(sizes) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    inject(small_llama)
    assert linear_sizes(small_llama, lambda name: name.endswith("q_proj")) == sizes


def test_adapter_that_does_not_fit_names_the_linear(small_llama: LlamaForCausalLM) -> None:
    sizes = linear_sizes(small_llama)
    check_fits(small_llama, sizes)
    with pytest.raises(InvalidInput, match=r"'model\.layers\.7\.mlp\.up_proj'"):
        check_fits(small_llama, {"model.layers.7.mlp.up_proj": (32, 48)})
    with pytest.raises(InvalidInput, match=r"\(32, 48\) in the backbone, \(48, 32\) in the adapter"):
        check_sizes(sizes, {"model.layers.0.mlp.up_proj": (48, 32)})
