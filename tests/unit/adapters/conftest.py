from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from server.adapters.inventory import Inventory

settings.register_profile("adapters", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("adapters")

MakeInventory = Callable[..., Inventory]


@pytest.fixture(scope="session")
def make_inventory() -> MakeInventory:
    """An inventory of random, distinct blocks over linears of different shapes, all divisible by the heads."""

    def make(
        *,
        heads: int = 2,
        skills: int = 3,
        rank: int = 2,
        sizes: Mapping[str, tuple[int, int]] | None = None,
        alpha: float = 1.0,
        seed: int = 0,
        **fields: Any,
    ) -> Inventory:
        random = torch.Generator().manual_seed(seed)
        sizes = sizes or {"a.q": (2 * heads, 3 * heads), "b.q": (2 * heads, 3 * heads), "a.o": (3 * heads, heads)}
        about = {"backbone_fingerprint": "f" * 64, "backbone_name": "tiny", "prompt_format": "plain"} | fields
        return Inventory(
            A={n: torch.randn(heads, skills, i // heads, rank, generator=random) for n, (i, _) in sizes.items()},
            B={n: torch.randn(heads, skills, rank, o // heads, generator=random) for n, (_, o) in sizes.items()},
            alpha=alpha,
            **about,
        )

    return make


@pytest.fixture
def small_llama() -> LlamaForCausalLM:
    """Two layers, grouped key/value heads, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def small_gpt2() -> GPT2LMHeadModel:
    """Two layers of Conv1D, random weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=64, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()
