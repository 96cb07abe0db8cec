"""The steps of an adaptation: those that search a state by what is held out, and those that learn from all examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from server.errors import InvalidInput
from server.training.batches import Batch, EncodedExample, collate
from server.training.checkpoint import Checkpoint
from server.training.learners import Learner
from server.training.methods import Hyperparameters
from server.training.rest import Rest
from server.training.sampling import BatchSampler
from server.training.trainer import Trainer
from server.training.validation import Validation, chance

_VALIDATION_BATCH = 16
_NOTES = frozenset({"validations", "kept_step", "best_accuracy", "rests"})  # of a checkpoint, beside the trainer's


class JobContext(Protocol):
    """What a running adaptation needs of whoever runs it."""

    def should_stop(self) -> bool:
        """Asked before every step."""
        ...

    def report(self, event: str, data: dict[str, Any]) -> None:
        """Told of every `step` and `validation`, of the `refit`, and of what became of a checkpoint."""
        ...

    def save(self, checkpoint: bytes) -> None:
        """Given a state from which the same adaptation can go on; may raise what went wrong with an earlier one."""
        ...


class Stopped(Exception):
    """`should_stop` ended the adaptation before it was done; its last checkpoint stands."""


class Search:
    """Training with early stopping: the latest state that is as good as any, kept with the trainer's in checkpoints.

    With the few examples that a job holds out, a small difference between two states is chance, and the one that
    learnt longer is the better bet. So a state is kept unless its accuracy falls behind the best one's by more. From
    the kept state the last steps learn from all examples: of a few, those held out are many to miss. Where no state
    that has learnt is kept, none is wanted.
    """

    def __init__(
        self,
        trainer: Trainer,
        train: Sequence[EncodedExample],
        held_out: Sequence[EncodedExample],
        settings: Hyperparameters,
        context: JobContext,
        *,
        refit: bool,
    ) -> None:
        """`refit`: whether the held-out examples may be learnt from once they have said what they can."""
        every = [*train, *held_out]
        seed = trainer.config.seed
        self._trainer = trainer
        self._sampler = BatchSampler(train, settings.batch_size, seed)
        self._refit_sampler = BatchSampler(every, settings.batch_size, seed)
        self._rest = Rest(every, settings.rest, self._sampler.steps_per_epoch)
        self._held_out = held_out
        self._settings = settings
        self._search_steps = settings.steps - (round(settings.steps * settings.refit) if refit else 0)
        self._context = context
        self._best_accuracy = 0.0
        self._kept: Sequence[Validation] = ()  # of each held-out example
        self._kept_parameters: Mapping[str, Tensor] = {}
        self.kept_step = 0

    def run(self) -> None:
        if not self._kept:
            self._validate()
        if not self._refitting:
            self._find()
        if self._is_refit_due():
            self._refit()

    @property
    def refitted(self) -> bool:
        """Whether what is kept has learnt from the held-out examples."""
        return self.kept_step > self._search_steps

    @property
    def _refitting(self) -> bool:
        return self._trainer.step_count > self._search_steps

    def load(self, data: bytes) -> None:
        """Go on from a checkpoint of the same adaptation.

        Raises InvalidInput, with nothing changed, when it is damaged or of a server with other defaults or notes.
        """
        checkpoint = Checkpoint.from_bytes(data)
        if missing := _NOTES - checkpoint.notes.keys():
            raise InvalidInput(f"the checkpoint is of another version of the server: no {', '.join(sorted(missing))}")
        notes, self._kept_parameters = self._trainer.load(checkpoint)
        self._kept = [Validation(**of_one) for of_one in notes["validations"]]
        self.kept_step = notes["kept_step"]
        self._best_accuracy = notes["best_accuracy"]
        self._rest.load(notes["rests"])

    def restore_kept(self) -> Sequence[Validation]:
        """Put the kept state back; returns how good it was when it was last compared, of each held-out example."""
        self._trainer.load_parameters(self._kept_parameters)
        return self._kept

    def _find(self) -> None:
        """Step on the training part and compare states, until one falls behind for too long."""
        for step in self._steps(self._sampler, self._search_steps):
            if self._is_due(step) or step == self._search_steps:
                self._validate()
                if step - self.kept_step >= self._settings.patience * self._settings.evaluate_every:
                    return
                self._context.save(self._state())

    def _refit(self) -> None:
        """Step on from the kept state on all examples; there is nothing to compare what comes of it by."""
        if not self._refitting:
            self._context.report("refit", {"from_step": self.kept_step})
            self._trainer.load_parameters(self._kept_parameters)
            self._trainer.step_count = self._search_steps  # with the rates that the last steps have
        for step in self._steps(self._refit_sampler, self._settings.steps):
            if self._is_due(step) and step < self._settings.steps:
                self._context.save(self._state())
        self._kept_parameters, self.kept_step = self._trainer.copy_parameters(), self._trainer.step_count

    def _steps(self, sampler: BatchSampler, last: int) -> Iterator[int]:
        """Take steps up to number `last`, each reported; raises Stopped, the state saved, when told to stop."""
        piece_size = self._trainer.lanes.piece_size(self._settings.batch_size)
        batches = sampler.from_step(self._trainer.step_count, piece_size, rest=self._rest)
        while self._trainer.step_count < last:
            if self._context.should_stop():
                self._context.save(self._state())
                raise Stopped
            done = self._step(next(batches), sampler.sequences_per_step)
            step = self._trainer.step_count
            self._context.report("step", {"step": step, "steps": self._settings.steps, **done})
            yield step

    def _step(self, batches: Sequence[Batch], sequences: int) -> dict[str, Any]:
        """One step; returns its loss, to which the examples at rest have added nothing, and the number of those."""
        step = self._trainer.step_count
        examples = [example for batch in batches for example in batch.examples]
        at_rest = sequences - len(examples)
        loss = self._trainer.step(*batches, at_rest=at_rest)
        self._rest.note(examples, loss.of_sequences.tolist(), step)
        return {"loss": round(loss.mean.item(), 5), "at_rest": at_rest}

    def _is_refit_due(self) -> bool:
        """Whether steps are left for all examples, and the search, if there was one, has kept a state that learnt."""
        has_something_to_go_on_from = self.kept_step > 0 or self._search_steps == 0
        return self._search_steps < self._settings.steps and has_something_to_go_on_from

    def _is_due(self, step: int) -> bool:
        return step % self._settings.evaluate_every == 0

    def _validate(self) -> None:
        of_each = validate_each(self._trainer, self._held_out)
        validation = Validation.mean(of_each)
        step = self._trainer.step_count
        self._context.report("validation", {"step": step, "of": "learner", **asdict(validation)})
        self._best_accuracy = max(self._best_accuracy, validation.accuracy)
        if validation.accuracy >= self._best_accuracy - chance(self._best_accuracy, len(of_each)):
            self._kept, self.kept_step = of_each, step
            self._kept_parameters = self._trainer.copy_parameters()

    def _state(self) -> bytes:
        notes = {
            "validations": [asdict(of_one) for of_one in self._kept],
            "kept_step": self.kept_step,
            "best_accuracy": self._best_accuracy,
            "rests": self._rest.state(),
        }
        return self._trainer.to_bytes(notes, self._kept_parameters)


def validate_each(
    trainer: Trainer, examples: Sequence[EncodedExample], learner: Learner | None = None
) -> list[Validation]:
    """Of each example, in their order, computed in batches of similar length; of another learner where one is given."""
    by_length = sorted(range(len(examples)), key=lambda place: examples[place].length)
    pieces = [by_length[i : i + _VALIDATION_BATCH] for i in range(0, len(examples), _VALIDATION_BATCH)]
    validations = trainer.validate([collate([examples[place] for place in piece]) for piece in pieces], learner)
    of_place = dict(zip(by_length, validations, strict=True))
    return [of_place[place] for place in range(len(examples))]
