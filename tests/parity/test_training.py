"""Our training step's gradients against those that PEFT Poly's layers get from the same batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedModel

from server.adapters.injection import inject
from server.adapters.peft_format import TargetBackbone, read_poly
from server.training.batches import EncodedExample, collate
from server.training.learners import RoutedLearner
from server.training.trainer import Trainer, TrainerConfig

TASKS = 5


def make_examples() -> list[EncodedExample]:
    random = torch.Generator().manual_seed(3)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 211, (length,), generator=random).tolist())

    shapes = [(4, 9, 3), (0, 17, 1), (4, 5, 6), (2, 12, 2)]  # task, prompt, answer; tasks 1 and 3 stay away
    return [EncodedExample(task, tokens(prompt), (tokens(answer),)) for task, prompt, answer in shapes]


@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_of_skills_and_routing_are_pefts(
    tiny_llama: Callable[[], LlamaForCausalLM],
    random_poly: Callable[..., PeftModel],
    target_of: Callable[[PreTrainedModel], TargetBackbone],
    tmp_path: Path,
    heads: int,
) -> None:
    ours, theirs = tiny_llama(), tiny_llama()
    poly = random_poly(theirs, heads=heads, skills=3, rank=2, tasks=TASKS)  # eval mode: without noise
    poly.save_pretrained(tmp_path)
    inventory = read_poly(tmp_path, target_of(ours), name="task")
    examples = make_examples()
    batch = collate(examples)

    learner = RoutedLearner(inventory, torch.stack(list(inventory.routings.values())), train_skills=True)
    our_loss = Trainer(ours, inject(ours), learner, TrainerConfig(steps=1)).losses(batch).mean()
    our_loss.backward()

    for parameter in poly.parameters():
        parameter.requires_grad_(True)
    losses = []
    for example in examples:
        tokens = torch.tensor([[*example.prompt, *example.answers[0]]])
        logits = poly(input_ids=tokens, task_ids=torch.tensor([example.task])).logits[0]
        start = len(example.prompt)
        losses.append(torch.nn.functional.cross_entropy(logits[start - 1 : -1], tokens[0, start:]))
    their_loss = torch.stack(losses).mean()
    their_loss.backward()

    torch.testing.assert_close(our_loss, their_loss, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in poly.named_parameters()}
    assert learner.routing.grad is not None
    for group, A, B in zip(inventory.groups, learner.A, learner.B, strict=True):
        for place, (linear, row) in enumerate(zip(group.linears, group.rows, strict=True)):
            prefix = f"base_model.model.{linear}"
            routing = gradients[f"{prefix}.poly_router.default.module_logits"]
            close = {"atol": 1e-5, "rtol": 1e-3}
            torch.testing.assert_close(A.grad[place], gradients[f"{prefix}.poly_lora_A.default"], **close)
            torch.testing.assert_close(B.grad[place], gradients[f"{prefix}.poly_lora_B.default"], **close)
            torch.testing.assert_close(learner.routing.grad[:, row].flatten(1), routing, **close)
    assert learner.routing.grad[[1, 3]].eq(0).all()
    assert learner.routing.grad[[0, 2, 4]].abs().amax(dim=(1, 2, 3)).gt(0).all()
