"""Tiny random models of several families and a driver that runs an engine to the end."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from server.adapters.assembly import Adapter, LowRank
from server.adapters.injection import inject, linear_sizes
from server.engine.config import EngineConfig, StepStats
from server.engine.engine import Engine
from server.engine.request import AdapterHandle, EngineRequest, FinishOutput, Output, SamplingParams, TokenOutput
from server.engine.runner import Runner

VOCAB = 97
EOS = 3
CONTEXT = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "initializer_range": 0.3,  # wide, so that likely tokens differ by more than rounding
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama_head_dim": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"head_dim": 6, "num_key_value_heads": 4})),
    "llama_biased": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "llama_gelu": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, hidden_act="gelu")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE | {"head_dim": 8})),
    "mistral_sliding": lambda: MistralForCausalLM(MistralConfig(**SHAPE | {"sliding_window": 5})),
    "qwen2_mixed_layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2_scaled_by_layer": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
}


def make_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A tiny random model, the same for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which begin as zeros
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_adapter(model: PreTrainedModel, seed: int, rank: int = 2, linears: Iterable[str] | None = None) -> Adapter:
    """A random adapter over all linears, or the named ones, strong enough to change the model's answers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = linear_sizes(model)
    return Adapter(
        weights={
            name: LowRank(
                torch.randn(sizes[name][0], rank, generator=generator) * 0.2,
                torch.randn(rank, sizes[name][1], generator=generator) * 0.2,
            )
            for name in (linears or sizes)
        },
        alpha=2.0 * rank,
        rank=rank,
    )


def add_to_weights(model: PreTrainedModel, adapter: Adapter | None) -> PreTrainedModel:
    """A copy of a model, not injected, with the adapter added into its weights: the independent truth."""
    merged = copy.deepcopy(model)
    for name, low_rank in ({} if adapter is None else adapter.weights).items():
        module = merged.get_submodule(name)
        delta = adapter.scaling * low_rank.A @ low_rank.B  # (d_in, d_out)
        module.weight.data += delta if delta.shape == module.weight.shape and "Conv1D" in str(type(module)) else delta.T
    return merged


def reference_tokens(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What transformers generates greedily after the prompt, the end-of-text token included."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return out[0, len(prompt) :].tolist()


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return tuple(torch.randint(4, VOCAB, (length,), generator=generator).tolist())


@dataclass(frozen=True)
class Answer:
    """All that one request got."""

    tokens: list[int]
    outputs: list[TokenOutput]
    finish: FinishOutput


class Driver:
    """An engine over a copy of a model, run step by step in the test."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig | None = None) -> None:
        self.plain = model
        served = copy.deepcopy(model)
        self.config = config or EngineConfig(max_batch=8, max_context=CONTEXT, prefill_chunk=16)
        self.runner = Runner(served, inject(served), self.config)
        self.engine = Engine(self.runner, self.config, frozenset({EOS}))
        self.outputs: list[Output] = []
        self.stats: list[StepStats] = []
        self._ids = itertools.count()

    def add(
        self,
        prompt: Sequence[int],
        *,
        task: str = "t",
        adapter: AdapterHandle | None = None,
        score: Sequence[int] | None = None,
        **sampling: object,
    ) -> str:
        request_id = f"r{next(self._ids)}"
        params = SamplingParams(**{"max_new_tokens": 8, **sampling})
        scored = None if score is None else tuple(score)
        self.engine.add(EngineRequest(request_id, task, tuple(prompt), params, adapter, scored))
        return request_id

    def step(self) -> None:
        outputs, stats = self.engine.step()
        self.outputs += outputs
        if stats is not None:
            self.stats.append(stats)
        self.engine.check_integrity()

    def run(self) -> None:
        """Step until nothing is left."""
        for _ in range(1000):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to an end"
        assert self.engine.scheduler.kv_slots.num_used == 0

    def answer(self, request_id: str) -> Answer:
        mine = [o for o in self.outputs if o.request_id == request_id]
        finishes = [o for o in mine if isinstance(o, FinishOutput)]
        assert len(finishes) == 1, f"{request_id} has {len(finishes)} last events"
        assert mine[-1] is finishes[0], f"{request_id} got something after its last event"
        tokens = [o for o in mine if isinstance(o, TokenOutput)]
        return Answer([o.token_id for o in tokens], tokens, finishes[0])

    def tokens(self, request_id: str) -> list[int]:
        return self.answer(request_id).tokens

    def handle(self, seed: int, **options: object) -> AdapterHandle:
        return AdapterHandle(f"adapter-{seed}-{options}", make_adapter(self.plain, seed, **options))
