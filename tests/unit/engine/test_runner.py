"""What the runner refuses to serve, and what it leaves as it found it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from server.adapters.injection import inject
from server.engine.compiled_forward import CompiledForward
from server.engine.config import EngineConfig, Quantization
from server.engine.forward import ModelForward
from server.engine.runner import Runner
from server.errors import InvalidInput
from server.native.library import load_library
from tests.support.int8 import needs_int8
from tests.unit.engine.driver import CONTEXT, SHAPE, Driver, make_model, random_prompt

GEMMA = {key: value for key, value in SHAPE.items() if key not in ("bos_token_id", "eos_token_id")}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}


def runner(model: PreTrainedModel, max_context: int = CONTEXT) -> Runner:
    return Runner(model, inject(model), EngineConfig(max_batch=2, max_context=max_context))


def test_soft_capped_attention_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="softcap"):
        runner(Gemma2ForCausalLM(Gemma2Config(**GEMMA, head_dim=8)))


def test_attention_that_bypasses_the_cache_is_refused() -> None:
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(InvalidInput, match="cannot be served exactly"):
        runner(BloomForCausalLM(config))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(InvalidInput, match="decoder-only"):
        runner(T5ForConditionalGeneration(config))


def test_layers_of_an_unknown_kind_are_refused() -> None:
    model = make_model()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(InvalidInput, match="chunked_attention"):
        runner(model)


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(InvalidInput, match="max_context is 65, the backbone"):
        runner(make_model(), max_context=CONTEXT + 1)


def test_position_encodings_that_depend_on_the_batch_are_refused_beyond_their_first_range() -> None:
    config = LlamaConfig(**SHAPE, rope_parameters=LONGROPE)
    with pytest.raises(InvalidInput, match="lower max_context from 64 to 32"):
        runner(LlamaForCausalLM(config))
    runner(LlamaForCausalLM(config), max_context=32)


def test_a_cache_that_computes_other_numbers_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    attention = model.get_submodule("model.layers.1.self_attn")
    own = type(attention).forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, **rest: object) -> object:
        return own(self, hidden_states * (1 + 0.01 * hidden_states.shape[1]), **rest)  # looks at the batch's length

    monkeypatch.setattr(type(attention), "forward", forward)
    with pytest.raises(InvalidInput, match="logits differ by"):
        runner(model)


def test_a_16_bit_model_is_served() -> None:
    runner(make_model().to(torch.bfloat16))


def test_the_probe_leaves_no_trace_in_the_cache() -> None:
    driver = Driver(make_model())
    attention = driver.runner._attention
    assert all(not layer.keys.any() and not layer.values.any() for layer in attention._layers.values())
    assert len(attention._layers) == 2


@pytest.mark.parametrize("operators", [True, False], ids=["compiled", "torch"])
def test_an_exception_in_the_forward_pass_gives_the_model_its_attention_back(
    monkeypatch: pytest.MonkeyPatch, operators: bool
) -> None:
    driver = Driver(make_model(), EngineConfig(max_batch=2, max_context=CONTEXT, operators=operators))
    before = driver.runner._model.config._attn_implementation
    request_id = driver.add(random_prompt(0, 4))
    with monkeypatch.context() as patch:
        patch.setattr(driver.runner._model.model.embed_tokens, "forward", lambda *_: 1 / 0)
        driver.step()
    assert driver.answer(request_id).finish.reason == "error"
    assert driver.runner._model.config._attn_implementation == before
    assert driver.runner._attention._batch is None
    assert driver.runner._context.mix is None


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", torch.float32), pytest.param("int8", torch.float16, marks=needs_int8)]
)
def test_the_operators_tables_are_as_exact_as_the_weights(
    quantization: Quantization, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if load_library() is None:
        pytest.skip("the compiled operators were not built")
    config = EngineConfig(max_batch=2, max_context=CONTEXT, quantization=quantization)
    assert Driver(make_model(), config).runner._slots.dtype == dtype
    monkeypatch.setattr("server.engine.runner.load_library", lambda: None)
    assert Driver(make_model(), config).runner._slots.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "compiled"),
    [
        ("llama", True),
        ("llama_biased", True),
        ("mistral_sliding", True),
        ("qwen2", True),
        ("llama_gelu", False),
        ("qwen3", False),
        ("gpt2", False),
    ],
)
def test_models_of_a_known_make_are_computed_by_operators(family: str, compiled: bool) -> None:
    if load_library() is None:
        pytest.skip("the compiled operators were not built")
    assert type(runner(make_model(family))._forward) is (CompiledForward if compiled else ModelForward)


def test_a_model_that_was_changed_computes_by_its_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    mlp = model.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(mlp, "forward", lambda x: type(mlp).forward(mlp, x) * 2)
    assert type(runner(model)._forward) is ModelForward
