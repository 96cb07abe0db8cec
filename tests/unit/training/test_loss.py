"""The packed loss and its gradients are those of every sequence computed by itself, by transformers' own forward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config
from transformers import PreTrainedConfig as Config

from server.adapters.injection import inject, linear_sizes
from server.adapters.task_rows import TaskRows
from server.errors import InvalidInput
from server.training import attention
from server.training.attention import PackedAttention
from server.training.batches import EncodedExample, collate
from server.training.loss import answer_accuracies, answer_logits, answer_losses

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**_SMALL),
    "qwen2 with biases": Qwen2Config(**_SMALL),
    "mistral with a sliding window": MistralConfig(**_SMALL, sliding_window=5),
    "gpt2 with learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=101, n_positions=64),
}
Pairs = dict[str, tuple[Tensor, Tensor]]


def _sequence(task: int, prefix: int, own: int, answer: int, seed: int) -> EncodedExample:
    """`prefix` tokens that are the task's, then tokens of its own."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    drawn = torch.randint(5, 101, (own + answer,), generator=generator).tolist()
    common = [5 + (7 * task + i) % 90 for i in range(prefix)]
    return EncodedExample(task, (*common, *drawn[:own]), (tuple(drawn[own:]),))


BATCHES = {
    "mixed tasks, with and without company": [
        _sequence(3, 9, 4, 2, 0),
        _sequence(1, 6, 5, 1, 1),
        _sequence(3, 9, 7, 3, 2),
        _sequence(0, 8, 3, 4, 3),
        _sequence(3, 9, 1, 1, 4),
        _sequence(1, 6, 2, 6, 5),
    ],
    "one task": [_sequence(0, 7, 1 + i, 1 + i % 3, i) for i in range(4)],
    "nothing shared": [_sequence(task, 0, 4 + task, 2, task) for task in (2, 1, 1)],
    "one sequence": [_sequence(2, 0, 6, 3, 0)],
    "the same prompt twice": [_sequence(0, 5, 2, 1, 0), _sequence(0, 5, 2, 1, 0)],
}


def _model(config: Config, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(device=device, dtype=dtype).eval()


def _adapters(model: PreTrainedModel, num_tasks: int) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    like = {"device": model.device, "dtype": model.dtype}

    def draw(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=generator)).to(**like).requires_grad_()

    return {n: (draw(num_tasks, i, 3), draw(num_tasks, 3, o)) for n, (i, o) in linear_sizes(model).items()}


def _one_by_one(model: PreTrainedModel, adapters: Pairs, examples: Sequence[EncodedExample]) -> Tensor:
    """Each sequence through the model's own forward and attention, its adapter as a plain low-rank sum."""
    context, tasks = inject(model), sorted({example.task for example in examples})
    losses = []
    for example in examples:
        place = tasks.index(example.task) if len(tasks) > 1 else 0
        own = {name: (A[place : place + 1], B[place : place + 1]) for name, (A, B) in adapters.items()}
        answer = example.answers[0]
        tokens = torch.tensor([[*example.prompt, *answer]], device=model.device)
        with context.use(TaskRows(own, [tokens.shape[1]])):
            logits = model(input_ids=tokens, use_cache=False).logits[0].float()
        start = len(example.prompt)
        losses.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], tokens[0, start:]))
    return torch.stack(losses).mean()


def _packed(model: PreTrainedModel, adapters: Pairs, examples: Sequence[EncodedExample]) -> Tensor:
    batch = collate(examples).to(model.device)
    return answer_losses(answer_logits(model, inject(model), PackedAttention(model), adapters, batch), batch).mean()


def _compare(model: PreTrainedModel, examples: Sequence[EncodedExample], tolerance: float) -> None:
    adapters = _adapters(model, len({example.task for example in examples}))
    parameters = [tensor for pair in adapters.values() for tensor in pair]
    expected, ours = (_one_by_one(model, adapters, examples), _packed(model, adapters, examples))
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
    reference = torch.autograd.grad(expected, parameters)
    assert all(gradient.abs().max() > 0 for gradient in reference)
    for mine, theirs in zip(torch.autograd.grad(ours, parameters), reference, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_the_sequences_one_by_one(config: str, batch: str) -> None:
    _compare(_model(CONFIGS[config]), BATCHES[batch], 1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_fused_kernel_over_padded_rows_equals_them_too(
    config: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend_blocks", attention.attend_rows)
    _compare(_model(CONFIGS[config]), BATCHES[batch], 1e-5)


def test_one_adapter_for_all_tasks() -> None:
    model, examples = _model(CONFIGS["llama"]), BATCHES["mixed tasks, with and without company"]
    shared = _adapters(model, 1)
    spread = {name: (A.expand(3, -1, -1), B.expand(3, -1, -1)) for name, (A, B) in shared.items()}
    torch.testing.assert_close(_packed(model, shared, examples), _one_by_one(model, spread, examples))


def test_without_adapters_it_is_the_bare_backbone() -> None:
    model, examples = _model(CONFIGS["llama"]), BATCHES["one task"]
    with torch.inference_mode():
        torch.testing.assert_close(_packed(model, {}, examples), _one_by_one(model, {}, examples))


def test_the_backbone_gets_no_gradient_and_keeps_its_own_attention() -> None:
    model, examples = _model(CONFIGS["llama"]), BATCHES["one task"]
    tokens = torch.arange(20)[None]
    inject(model)
    before = model(input_ids=tokens).logits
    _packed(model, _adapters(model, 1), examples).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_bf16_is_near_fp32() -> None:
    examples = BATCHES["mixed tasks, with and without company"]
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = _model(CONFIGS["llama"], dtype=dtype)
        adapters = _adapters(model, 3)
        losses[dtype] = _packed(model, adapters, examples)
        losses[dtype].backward()
        assert all(A.grad is not None and A.grad.isfinite().all() for A, _ in adapters.values())
    torch.testing.assert_close(*losses.values(), atol=0.05, rtol=0)


def test_a_layer_with_another_kind_of_attention_is_refused() -> None:
    model, examples = _model(CONFIGS["llama"]), BATCHES["one task"]
    model.model.layers[1].self_attn = _NoAttention()
    with pytest.raises(InvalidInput, match="only 1 of the backbone's 2 layers"):
        _packed(model, {}, examples)


class _NoAttention(torch.nn.Module):
    """As a recurrent layer would be: it mixes tokens without asking an attention function."""

    def forward(self, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
        return hidden_states.cumsum(1), None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    for config in CONFIGS.values():
        model = _model(config, "cuda")
        for batch in BATCHES.values():
            _compare(model, batch, 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_on_a_gpu_is_near_fp32_on_a_cpu() -> None:
    for config in CONFIGS.values():
        for batch in BATCHES.values():
            losses = []
            for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
                model = _model(config, device, dtype)
                adapters = _adapters(model, len({example.task for example in batch}))
                loss = _packed(model, adapters, batch)
                loss.backward()
                assert all(A.grad is not None and A.grad.isfinite().all() for A, _ in adapters.values())
                losses.append(loss.item())
            assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_accuracy_is_of_tokens_and_every_sequence_counts_alike() -> None:
    batch = collate([EncodedExample(0, (1, 2), ((3, 4),)), EncodedExample(0, (1, 5), ((6,),))])
    logits = torch.full((3, 8), -1.0)
    for place, target in enumerate(batch.targets.tolist()):
        logits[place, target] = 1.0
    assert answer_accuracies(logits, batch).tolist() == [1.0, 1.0]
    logits[batch.targets.tolist().index(4)] = 0.0  # one of the two tokens of one of the two sequences
    assert answer_accuracies(logits, batch).tolist() == [0.5, 1.0]
