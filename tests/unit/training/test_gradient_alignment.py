from __future__ import annotations

from itertools import combinations

import pytest
import torch

from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.training.batches import Batch, EncodedExample, collate
from server.training.gradient_alignment import choose_tasks, gradient_alignment
from server.training.learners import RoutedLearner
from server.training.trainer import Trainer, TrainerConfig


@pytest.fixture
def trainer(backbone: Backbone, inventory: Inventory) -> Trainer:
    routing = torch.stack(list(inventory.routings.values()))
    learner = RoutedLearner(inventory, routing, train_skills=True)
    return Trainer(backbone.model, inject(backbone.model), learner, TrainerConfig(steps=1))


def _batch(task: int, answer: int) -> Batch:
    return collate([EncodedExample(task, tuple(range(10 + i, 15 + i)), ((answer, 2),)) for i in range(3)])


def test_it_is_the_mean_cosine_over_pairs(trainer: Trainer) -> None:
    batches = [_batch(0, 50), _batch(1, 60), _batch(1, 70)]
    parameters = trainer.learner.adapter_parameters()
    flat = [
        torch.cat([g.flatten() for g in torch.autograd.grad(trainer.losses(b).mean(), parameters)]) for b in batches
    ]
    cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in combinations(flat, 2)]
    assert gradient_alignment(trainer, batches) == pytest.approx(sum(cosines) / 3, abs=1e-6)


def test_a_task_is_fully_aligned_with_itself(trainer: Trainer) -> None:
    assert gradient_alignment(trainer, [_batch(0, 50)] * 3) == pytest.approx(1.0, abs=1e-6)


def test_measuring_changes_nothing(trainer: Trainer) -> None:
    before = trainer.copy_parameters()
    gradient_alignment(trainer, [_batch(0, 50), _batch(1, 60)])
    assert all(torch.equal(before[name], value) for name, value in trainer.copy_parameters().items())
    assert all(parameter.grad is None for parameter in trainer.learner.parameters())


def test_one_task_has_nobody_to_align_with(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="at least two"):
        gradient_alignment(trainer, [_batch(0, 50)])


def test_the_sample_of_tasks_stays_the_same() -> None:
    assert choose_tasks(40, 8, seed=1) == choose_tasks(40, 8, seed=1) != choose_tasks(40, 8, seed=2)
    assert len(set(choose_tasks(40, 8, seed=1))) == 8
    assert choose_tasks(3, 8, seed=0) == [0, 1, 2]
