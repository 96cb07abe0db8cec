"""Our assembly against PEFT's own Poly layers, through a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.poly import Linear as PolyLinear
from transformers import LlamaForCausalLM, PreTrainedModel

from server.adapters.assembly import Adapter, assemble
from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.adapters.peft_format import TargetBackbone, read_poly
from server.adapters.task_rows import TaskRows

MakeLlama = Callable[[], LlamaForCausalLM]
MakePoly = Callable[..., PeftModel]
TargetOf = Callable[[PreTrainedModel], TargetBackbone]
SHAPES = {
    "heads": st.sampled_from([1, 2, 3, 4, 6, 12]),
    "skills": st.integers(1, 6),
    "rank": st.integers(1, 5),
    "seed": st.integers(0, 2**31),
}
PARITY = settings(settings.get_profile("parity"))


def through_disk(poly: PeftModel, target: TargetBackbone) -> Inventory:
    with TemporaryDirectory() as directory:
        poly.save_pretrained(directory)
        return read_poly(Path(directory), target, name="task")


def stacked(adapters: list[Adapter]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        linear: (
            torch.stack([adapter.weights[linear].A for adapter in adapters]),
            torch.stack([adapter.weights[linear].B * adapter.scaling for adapter in adapters]),
        )
        for linear in adapters[0].weights
    }


@PARITY
@given(**SHAPES)
@torch.no_grad()
def test_every_layer_of_every_task_gives_pefts_output(
    tiny_llama: MakeLlama,
    random_poly: MakePoly,
    target_of: TargetOf,
    heads: int,
    skills: int,
    rank: int,
    seed: int,
) -> None:
    model = tiny_llama()
    target = target_of(model)
    poly = random_poly(model, heads=heads, skills=skills, rank=rank, tasks=3, seed=seed)
    inventory = through_disk(poly, target)
    adapters = [assemble(inventory, inventory.routings[f"task-{task}"]) for task in range(3)]
    layers = {name: m for name, m in poly.base_model.model.named_modules() if isinstance(m, PolyLinear)}
    assert set(layers) == set(inventory.linears)
    for name, layer in layers.items():
        x = torch.randn(3, 4, layer.in_features, generator=torch.Generator().manual_seed(seed))
        theirs = layer(x, task_ids=torch.tensor([2, 0, 1]))
        for row, task in enumerate((2, 0, 1)):
            pair = adapters[task].weights[name]
            ours = layer.base_layer(x[row]) + adapters[task].scaling * (x[row] @ pair.A) @ pair.B
            torch.testing.assert_close(ours, theirs[row], atol=1e-5, rtol=1e-5)


@PARITY
@given(**SHAPES)
@torch.no_grad()
def test_mixed_batch_through_the_injected_model_gives_pefts_logits(
    tiny_llama: MakeLlama,
    random_poly: MakePoly,
    target_of: TargetOf,
    heads: int,
    skills: int,
    rank: int,
    seed: int,
) -> None:
    ours, model = tiny_llama(), tiny_llama()
    poly = random_poly(model, heads=heads, skills=skills, rank=rank, tasks=4, seed=seed)
    inventory = through_disk(poly, target_of(ours))
    rows = [3, 0, 2, 2, 1]
    tokens = torch.randint(0, 211, (5, 7), generator=torch.Generator().manual_seed(seed))
    theirs = poly(input_ids=tokens, task_ids=torch.tensor(rows)).logits
    context = inject(ours)
    adapters = [assemble(inventory, inventory.routings[f"task-{task}"]) for task in rows]
    with context.use(TaskRows(stacked(adapters), [tokens.shape[1]] * len(rows))):
        logits = ours(input_ids=tokens).logits
    torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[2], logits[3], atol=1e-2)  # same task, other tokens
