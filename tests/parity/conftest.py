from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from peft import PeftModel, PolyConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from server.adapters.injection import linear_sizes
from server.adapters.peft_format import TargetBackbone

settings.register_profile("parity", deadline=None, max_examples=15, derandomize=True, database=None)

# PEFT asks transformers for an attribute that transformers has renamed.
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(PEFT_WARNING))


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[[], LlamaForCausalLM]:
    """Makes the same random Llama each time; every head count up to 12 that divides 12 divides all its linears."""

    def make() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            vocab_size=211,
            max_position_embeddings=128,
            initializer_range=0.15,  # so that the logits are far enough apart for greedy tokens to be comparable
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[[], GPT2LMHeadModel]:
    """Makes the same random GPT-2, whose linears are Conv1D, each time."""

    def make() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            vocab_size=211,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.15,
        )
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture(scope="session")
def random_poly() -> Callable[..., PeftModel]:
    """Turns a model into a PEFT Poly model, on all its linears, all parameters random."""

    def make(model: PreTrainedModel, *, heads: int, skills: int, rank: int, tasks: int, seed: int = 0) -> PeftModel:
        names = list(linear_sizes(model))
        config = PolyConfig(
            r=rank, n_tasks=tasks, n_skills=skills, n_splits=heads, target_modules=names, task_type="CAUSAL_LM"
        )
        poly = get_peft_model(model, config).eval()
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in poly.named_parameters():
                if "poly_" in name:
                    spread = 3.0 if "router" in name else (skills / parameter.shape[-2]) ** 0.5
                    parameter.copy_(spread * torch.randn(parameter.shape, generator=random))
        return poly

    return make


@pytest.fixture(scope="session")
def target_of() -> Callable[[PreTrainedModel], TargetBackbone]:
    """The description of a model that an import needs."""

    def make(model: PreTrainedModel) -> TargetBackbone:
        return TargetBackbone(
            name="tiny", fingerprint="0" * 64, prompt_format="plain", linear_sizes=linear_sizes(model)
        )

    return make
