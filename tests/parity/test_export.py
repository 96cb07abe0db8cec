"""Exported tasks, loaded by PEFT itself, against PEFT Poly and against our own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from server.adapters.assembly import Adapter, assemble, mean_adapter
from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory
from server.adapters.peft_format import (
    TargetBackbone,
    inventory_from_loras,
    read_lora,
    read_poly,
    uses_conv1d,
    write_lora,
)
from server.adapters.task_rows import TaskRows

MakeModel = Callable[[], PreTrainedModel]
MakePoly = Callable[..., PeftModel]
TargetOf = Callable[[PreTrainedModel], TargetBackbone]
TASKS, NEW_TOKENS = 5, 12
PROMPTS = torch.randint(1, 211, (TASKS, 9), generator=torch.Generator().manual_seed(1))


def greedy(model: torch.nn.Module, tokens: Tensor, **options: Tensor) -> Tensor:
    """The new tokens of a greedy generation of fixed length."""
    out = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        **options,
    )
    return out[:, tokens.shape[1] :]


def exported(make: MakeModel, adapter: Adapter, directory: Path) -> PeftModel:
    """A fresh model with the adapter that PEFT reads from what we write."""
    model = make()
    write_lora(adapter, directory, base_model="tiny", fan_in_fan_out=uses_conv1d(model))
    return PeftModel.from_pretrained(model, str(directory)).eval()


@pytest.mark.parametrize(("heads", "skills", "rank"), [(1, 4, 3), (4, 3, 2), (12, 5, 4)])
@torch.no_grad()
def test_exported_task_is_pefts_task(
    tiny_llama: Callable[[], LlamaForCausalLM],
    random_poly: MakePoly,
    target_of: TargetOf,
    tmp_path: Path,
    heads: int,
    skills: int,
    rank: int,
) -> None:
    model = tiny_llama()
    target = target_of(model)
    poly = random_poly(model, heads=heads, skills=skills, rank=rank, tasks=TASKS)
    poly.save_pretrained(tmp_path / "poly")
    inventory = read_poly(tmp_path / "poly", target, name="task")
    every = torch.arange(TASKS)
    theirs = poly(input_ids=PROMPTS, task_ids=every).logits
    their_tokens = greedy(poly, PROMPTS, task_ids=every)
    assert len({tuple(row) for row in their_tokens.tolist()}) == TASKS
    for task in range(TASKS):
        adapter = assemble(inventory, inventory.routings[f"task-{task}"])
        lora = exported(tiny_llama, adapter, tmp_path / str(task))
        prompt = PROMPTS[task : task + 1]
        torch.testing.assert_close(lora(input_ids=prompt).logits, theirs[task : task + 1], atol=1e-4, rtol=1e-4)
        assert torch.equal(greedy(lora, prompt), their_tokens[task : task + 1])


def random_inventory(model: PreTrainedModel) -> Inventory:
    random = torch.Generator().manual_seed(2)
    heads, skills, rank = 4, 3, 2
    sizes = linear_sizes(model)
    return Inventory(
        A={n: torch.randn(heads, skills, i // heads, rank, generator=random) / i**0.5 for n, (i, _) in sizes.items()},
        B={n: torch.randn(heads, skills, rank, o // heads, generator=random) for n, (_, o) in sizes.items()},
        alpha=3.0,
        backbone_fingerprint="0" * 64,
        backbone_name="tiny",
        prompt_format="plain",
    )


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@torch.no_grad()
def test_exported_mean_gives_our_logits(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    make: MakeModel = request.getfixturevalue(kind)
    model = make()
    adapter = mean_adapter(random_inventory(model))
    lora = exported(make, adapter, tmp_path)
    context = inject(model)
    bare = model(input_ids=PROMPTS).logits
    pairs = {name: (pair.A[None], pair.B[None] * adapter.scaling) for name, pair in adapter.weights.items()}
    with context.use(TaskRows(pairs, [PROMPTS.numel()])):
        ours = model(input_ids=PROMPTS).logits
        our_tokens = greedy(model, PROMPTS)
    torch.testing.assert_close(lora(input_ids=PROMPTS).logits, ours, atol=1e-4, rtol=1e-4)
    assert torch.equal(greedy(lora, PROMPTS), our_tokens)
    assert not torch.allclose(ours, bare, atol=0.1)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_loras_that_peft_wrote_are_read_as_they_act(
    kind: str, rslora: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make: MakeModel = request.getfixturevalue(kind)
    model = make()
    sizes = linear_sizes(model)
    loras: dict[str, PeftModel] = {}
    for number in range(3):
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=list(sizes),
            use_rslora=rslora,
            fan_in_fan_out=uses_conv1d(model),
            init_lora_weights=False,
        )
        torch.manual_seed(number)
        loras[f"lora-{number}"] = get_peft_model(make(), config).eval()
        loras[f"lora-{number}"].save_pretrained(tmp_path / f"lora-{number}")
    adapters = {name: read_lora(tmp_path / name, sizes) for name in loras}
    target = TargetBackbone(name="tiny", fingerprint="0" * 64, prompt_format="plain", linear_sizes=sizes)
    inventory = inventory_from_loras(adapters, target)
    context = inject(model)
    for name, lora in loras.items():
        adapter = assemble(inventory, inventory.routings[name])
        pairs = {linear: (pair.A[None], pair.B[None] * adapter.scaling) for linear, pair in adapter.weights.items()}
        with context.use(TaskRows(pairs, [PROMPTS.numel()])):
            ours = model(input_ids=PROMPTS).logits
        torch.testing.assert_close(ours, lora(input_ids=PROMPTS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_conv1d_export_says_how_weights_are_stored(tiny_gpt2: Callable[[], GPT2LMHeadModel], tmp_path: Path) -> None:
    lora = exported(tiny_gpt2, mean_adapter(random_inventory(tiny_gpt2())), tmp_path)
    assert lora.peft_config["default"].fan_in_fan_out
    merged = lora.merge_and_unload()
    again = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path)).eval()
    torch.testing.assert_close(merged(input_ids=PROMPTS).logits, again(input_ids=PROMPTS).logits, atol=1e-4, rtol=1e-4)
