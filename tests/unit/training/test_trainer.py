from __future__ import annotations

from itertools import islice

import pytest
import torch

from server.adapters.injection import inject
from server.adapters.inventory import Inventory
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate, encode_examples
from server.training.checkpoint import Checkpoint
from server.training.examples import Example
from server.training.learners import FixedLearner, Learner, RoutedLearner, routing_learner
from server.training.optimizers import OptimizerName
from server.training.sampling import BatchSampler
from server.training.trainer import Trainer, TrainerConfig


def _encoded(backbone: Backbone, examples: list[Example]) -> list[EncodedExample]:
    """The examples of task 0, then the same ones of task 1."""
    return [
        item
        for task in (0, 1)
        for item in encode_examples(
            backbone.tokenizer,
            examples,
            task=task,
            instruction="",
            prompt_format="definition-input-output",
            context_length=256,
            place="examples",
        )
    ]


def _batches(backbone: Backbone, examples: list[Example], number: int, first: int = 0) -> list[Batch]:
    steps = BatchSampler(_encoded(backbone, examples), 4, seed=0).from_step(first)
    return [batch for (batch,) in islice(steps, number)]


def _learner(inventory: Inventory) -> RoutedLearner:
    return RoutedLearner(inventory, torch.stack(list(inventory.routings.values())), train_skills=True)


def _trainer(backbone: Backbone, learner: Learner, **settings: object) -> Trainer:
    return Trainer(backbone.model, inject(backbone.model), learner, TrainerConfig(steps=20, **settings))


def test_the_loss_is_transformers_own_on_the_answers(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    encoded = _encoded(backbone, examples)[:4]
    trainer = _trainer(backbone, _learner(inventory))
    ours = [of_one.loss for of_one in trainer.validate([collate(encoded)], FixedLearner(None))]
    losses = []
    for example in encoded:
        tokens = torch.tensor([[*example.prompt, *example.answers[0]]])
        labels = tokens.clone()
        labels[:, : len(example.prompt)] = -100
        losses.append(backbone.model(input_ids=tokens, labels=labels).loss)
    assert ours == pytest.approx(torch.stack(losses).tolist(), abs=1e-4)


def test_a_mixed_batch_has_the_losses_of_its_rows_alone(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    encoded = _encoded(backbone, examples)[10:14]
    assert {example.task for example in encoded} == {0, 1}
    trainer = _trainer(backbone, _learner(inventory))
    together = collate(encoded)
    alone = [collate([example]) for example in together.examples]
    for one, other in zip(trainer.validate(alone), trainer.validate([together]), strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.accuracy == pytest.approx(other.accuracy, abs=1e-4)


def test_training_learns_and_leaves_the_backbone_alone(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    trainer = _trainer(backbone, _learner(inventory), adapter_lr=1e-2)
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    losses = [trainer.step(batch).mean.item() for batch in _batches(backbone, examples, 20)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.named_parameters())


def test_routing_alone_moves_nothing_else(backbone: Backbone, inventory: Inventory, examples: list[Example]) -> None:
    learner = routing_learner(inventory, torch.Generator().manual_seed(0), train_skills=False)
    skills = learner.skills()
    trainer = _trainer(backbone, learner)
    routing = learner.routing.detach().clone()
    trainer.step(collate(_encoded(backbone, examples)[:4]))
    assert not torch.equal(learner.routing, routing)
    for before, after in zip(skills, learner.skills(), strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_a_resumed_run_is_the_uninterrupted_one(
    backbone: Backbone, inventory: Inventory, examples: list[Example], noise: bool, optimizer: OptimizerName
) -> None:
    def start() -> Trainer:
        return _trainer(backbone, _learner(inventory), noise=noise, optimizer=optimizer)

    straight = start()
    losses = [straight.step(batch).mean.item() for batch in _batches(backbone, examples, 8)]

    first = start()
    for batch in _batches(backbone, examples, 5):
        first.step(batch)
    saved = first.to_bytes({"best": 3}, {"kept": torch.ones(2)})

    second = start()
    notes, kept = second.load(Checkpoint.from_bytes(saved))
    resumed = [second.step(batch).mean.item() for batch in _batches(backbone, examples, 3, first=5)]
    assert resumed == losses[5:]
    assert notes == {"best": 3}
    assert torch.equal(kept["kept"], torch.ones(2))


def test_adafactor_learns_and_keeps_less_than_adamw(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    sizes = {}
    for optimizer in OptimizerName:
        trainer = _trainer(backbone, _learner(inventory), adapter_lr=1e-2, optimizer=optimizer)
        losses = [trainer.step(batch).mean.item() for batch in _batches(backbone, examples, 20)]
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
        sizes[optimizer] = len(trainer.to_bytes())
    assert sizes[OptimizerName.ADAFACTOR] < 0.7 * sizes[OptimizerName.ADAMW]


def test_noise_changes_the_steps(backbone: Backbone, inventory: Inventory, examples: list[Example]) -> None:
    (batch,) = _batches(backbone, examples, 1)
    plain, noisy = (_trainer(backbone, _learner(inventory), noise=noise).step(batch).mean for noise in (False, True))
    assert plain != noisy


def test_the_batches_of_a_step_draw_other_noise(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    (batch,) = _batches(backbone, examples, 1)
    once, twice = (_trainer(backbone, _learner(inventory), noise=True).step(*[batch] * n).mean for n in (1, 2))
    assert once != twice


@pytest.mark.parametrize("optimizer", list(OptimizerName))
def test_accumulated_batches_step_as_one_batch(
    backbone: Backbone, inventory: Inventory, examples: list[Example], optimizer: OptimizerName
) -> None:
    encoded = _encoded(backbone, [*examples, Example("another", ("a much longer answer",))])
    whole, pieces = _trainer(backbone, _learner(inventory), optimizer=optimizer), _learner(inventory)
    parts = _trainer(backbone, pieces, optimizer=optimizer)
    for first in range(0, 24, 8):
        rows = encoded[first : first + 8]
        loss = whole.step(collate(rows)).mean
        assert parts.step(collate(rows[:5]), collate(rows[5:7]), collate(rows[7:])).mean.item() == pytest.approx(
            loss.item()
        )
    for name, value in whole.copy_parameters().items():
        torch.testing.assert_close(parts.copy_parameters()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [False, True])
def test_batches_side_by_side_step_as_one_after_the_other(
    backbone: Backbone, inventory: Inventory, examples: list[Example], noise: bool
) -> None:
    encoded = _encoded(backbone, [*examples, Example("another", ("a much longer answer",))])
    steps = [[collate(encoded[first : first + 3]) for first in range(start, start + 12, 3)] for start in (0, 12)]
    alone = _trainer(backbone, _learner(inventory), noise=noise)
    losses = [alone.step(*batches).mean.item() for batches in steps]
    torch.set_num_threads(4)
    try:
        side_by_side = _trainer(backbone, _learner(inventory), noise=noise)
        assert side_by_side.lanes.number == 4
        assert [side_by_side.step(*batches).mean.item() for batches in steps] == pytest.approx(losses)
    finally:
        torch.set_num_threads(1)
    for name, value in alone.copy_parameters().items():
        torch.testing.assert_close(side_by_side.copy_parameters()[name], value, rtol=1e-5, atol=1e-5)


def test_sequences_at_rest_count_as_known(backbone: Backbone, inventory: Inventory, examples: list[Example]) -> None:
    encoded = _encoded(backbone, examples)
    full, resting = (_trainer(backbone, _learner(inventory)) for _ in range(2))
    batches = [collate(encoded[:2]), collate(encoded[2:3])]
    alone, beside = full.step(*batches), resting.step(*batches, at_rest=1)
    assert beside.of_sequences.tolist() == alone.of_sequences.tolist()
    untrained = _trainer(backbone, _learner(inventory))
    expected = [untrained.losses(collate([example])).item() for example in encoded[:3]]
    assert beside.of_sequences.tolist() == pytest.approx(expected, rel=1e-4)
    assert beside.mean.item() == pytest.approx(alone.of_sequences.sum().item() / 4)


def test_a_step_whose_sequences_all_rest_goes_on_as_the_last_ones_did(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    trainer = _trainer(backbone, _learner(inventory))
    trainer.step(*_batches(backbone, examples, 1))
    before = trainer.copy_parameters()
    loss = trainer.step(at_rest=4)
    assert (loss.mean.item(), loss.of_sequences.tolist(), trainer.step_count) == (0.0, [], 2)
    after = trainer.copy_parameters()
    assert any(not torch.equal(after[name], value) for name, value in before.items())  # AdamW's momentum


def test_a_checkpoint_of_other_settings_is_refused_with_their_names(backbone: Backbone, inventory: Inventory) -> None:
    saved = _trainer(backbone, _learner(inventory)).to_bytes()
    with pytest.raises(InvalidInput, match=r"other settings \(noise was False and is True, seed was 0 and is 1\)"):
        _trainer(backbone, _learner(inventory), seed=1, noise=True).load(Checkpoint.from_bytes(saved))


def test_learning_rates_rise_then_fall_to_zero(
    backbone: Backbone, inventory: Inventory, examples: list[Example]
) -> None:
    trainer = _trainer(backbone, _learner(inventory), adapter_lr=1e-3, routing_lr=0.1, warmup=0.2)
    seen = []
    for batch in _batches(backbone, examples, 20):
        trainer.step(batch)
        seen.append([group["lr"] for group in trainer._optimizer.param_groups])
    assert seen[0] == pytest.approx([2.5e-4, 0.025])
    assert seen[4] == pytest.approx([1e-3, 0.1])
    assert seen[-1] == pytest.approx([1e-3 / 16, 0.1 / 16])
