"""Multi-task pre-training: many tasks teach an inventory its skills, and each task its routing over them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from server.adapters.injection import inject, linear_sizes
from server.adapters.inventory import Inventory, InventoryTask, check_heads
from server.adapters.routing import fresh_routing, one_hot_routing
from server.adapters.spread import spread_skills
from server.backbone import Backbone
from server.errors import InvalidInput
from server.training.card import card
from server.training.checkpoint import Checkpoint, describe_differences
from server.training.distributed import ALONE, Processes
from server.training.gradient_alignment import choose_tasks, gradient_alignment
from server.training.learners import RoutedLearner, fresh_skills
from server.training.pretrain_config import PretrainConfig, PretrainMethod
from server.training.pretrain_data import PretrainData, describe_changes, load_data
from server.training.run_folder import CARD, INVENTORY, RunFolder, read_log
from server.training.sampling import BatchSampler
from server.training.trainer import Trainer
from server.training.validation import Validation

# Reading a loss makes a GPU wait for its work; a CPU has nothing to wait for.
_STEPS_A_REPORT = {"cpu": 1, "cuda": 10}


@dataclass(frozen=True)
class PretrainProgress:
    """One finished step: loss in nats per answer token, and seconds."""

    step: int
    steps: int
    loss: float
    seconds: float


def pretrain(
    config: PretrainConfig,
    backbone: Backbone,
    *,
    processes: Processes = ALONE,
    on_progress: Callable[[PretrainProgress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train an inventory and write it, its card and its log to `config.out`; returns the inventory's path.

    A run that was stopped goes on from its last checkpoint in `config.out`, with the same batches and
    noise as if it had not been. Returns None when `should_stop` ended it early. Of several processes only
    the first writes and reports, and `should_stop` has to answer all of them alike.
    Raises InvalidInput for data, settings, checkpoints or a disk that cannot be used, naming them.
    """
    data = load_data(config, backbone)
    run = _Run(config, backbone, data, processes)
    try:
        run.start()
        if not run.step_to_the_end(on_progress, should_stop):
            return None
        return run.finish()
    except OSError as error:
        raise InvalidInput(f"cannot use {config.out}: {error}; {run.what_is_kept()}") from error


class _Run:
    """A run in its folder: resumed or begun, stepped, finished."""

    def __init__(self, config: PretrainConfig, backbone: Backbone, data: PretrainData, processes: Processes) -> None:
        if config.alignment_every and len(data.tasks) < 2:
            raise InvalidInput("gradient alignment is between tasks, and there is one task; leave alignment_every out")
        self._config = config
        self._backbone = backbone
        self._data = data
        self._processes = processes
        self._folder = RunFolder(config.out)
        self._learner = make_learner(config, backbone, len(data.tasks))
        self._trainer = Trainer(backbone.model, inject(backbone.model), self._learner, config.trainer, processes)
        self._settings = config.settings() | {"backbone": backbone.fingerprint}
        self._before: dict[str, float] = {}  # held-out loss of each task before the first step
        self._saved_step = -1

    def start(self) -> None:
        """Take up the run's last checkpoint, or begin."""
        file = self._folder.checkpoint
        if file is not None:
            self._resume(file)
            return
        if self._processes.is_first:
            self._folder.begin_log()
        self._before = self._validate()
        self._log({"step": 0, "validation": self._before})

    def step_to_the_end(self, on_progress: Callable[[PretrainProgress], None], should_stop: Callable[[], bool]) -> bool:
        """Step until done; False when stopped early. Either way the state is on disk."""
        config, trainer = self._config, self._trainer
        sampler = BatchSampler(self._data.train, config.sequences_per_step, config.trainer.seed, config.sampling)
        piece_size = trainer.lanes.piece_size(config.batch_size)
        shares = sampler.from_step(trainer.step_count, piece_size, self._processes)
        report_every = _STEPS_A_REPORT[trainer.device.type]
        losses: list[Tensor] = []
        since = time.perf_counter()
        while trainer.step_count < config.trainer.steps and not should_stop():
            losses.append(trainer.step(*next(shares)).mean)
            step = trainer.step_count
            measure = config.alignment_every and step % config.alignment_every == 0
            save = step % config.checkpoint_every == 0
            if measure or save or len(losses) >= report_every:
                self._report(losses, since, on_progress)
                if measure:
                    self._measure_alignment()
                if save:
                    self._save()
                losses, since = [], time.perf_counter()
        self._report(losses, since, on_progress)
        self._save()
        return trainer.step_count >= config.trainer.steps

    def finish(self) -> Path:
        """Validate, and write the inventory and its card."""
        after = self._validate()
        self._log({"step": self._trainer.step_count, "validation": after})
        inventory = self._inventory(after)
        if (spread := self._config.layout.spread) is not None:
            inventory = spread_skills(inventory, spread)
        if self._processes.is_first:
            losses = [record["loss"] for record in read_log(self._folder.path) if "loss" in record]
            self._folder.write(CARD, card(inventory, losses).encode())
            self._folder.write(INVENTORY, inventory.to_bytes())
        return self._folder.path / INVENTORY

    def what_is_kept(self) -> str:
        """What a run that had to stop leaves to go on from."""
        if self._saved_step < 0:
            return "no checkpoint was written yet; put that right and run the command again"
        return f"the checkpoint of step {self._saved_step} is kept; put that right and run the command again to go on"

    def _inventory(self, after: Mapping[str, float]) -> Inventory:
        """What was learnt, as it was learnt; `after` is each task's held-out loss."""
        A, B = self._learner.skills()
        tasks = self._data.tasks
        return Inventory(
            A=A,
            B=B,
            alpha=self._config.alpha,
            backbone_fingerprint=self._backbone.fingerprint,
            backbone_name=self._backbone.name,
            prompt_format=self._config.prompt_format,
            routings={task.task: self._learner.routing[i].detach().cpu() for i, task in enumerate(tasks)},
            tasks={t.task: InventoryTask(t.instruction, t.licence, t.source) for t in tasks},
            training={**self._config.settings(), "validation_before": self._before, "validation_after": dict(after)},
        )

    def _resume(self, file: Path) -> None:
        try:
            checkpoint = Checkpoint.from_bytes(file.read_bytes())
        except InvalidInput as error:
            raise InvalidInput(
                f"the checkpoint {file} is damaged: {error}; delete it to go on from the one before it, if there "
                "is one, or else from the start"
            ) from error
        notes = checkpoint.notes
        if differences := describe_differences(notes["settings"], self._settings):
            raise InvalidInput(
                f"the run in {self._folder.path} was begun with other settings ({differences}); "
                "resume with those, or begin anew in another folder"
            )
        if changes := describe_changes(notes["data"], self._data.digests()):
            raise InvalidInput(
                f"the tasks in {self._config.data} are not those that the run in {self._folder.path} was begun with "
                f"({changes}); put them back, or begin anew in another folder"
            )
        self._trainer.load(checkpoint)
        self._saved_step = checkpoint.step
        self._before = notes["validation_before"]
        if self._processes.is_first:
            self._folder.cut_log(checkpoint.step)

    def _save(self) -> None:
        step = self._trainer.step_count
        if step == self._saved_step or not self._processes.is_first:
            return
        notes = {"settings": self._settings, "data": self._data.digests(), "validation_before": self._before}
        self._folder.write_checkpoint(self._trainer.to_bytes(notes))
        self._saved_step = step

    def _report(self, losses: list[Tensor], since: float, on_progress: Callable[[PretrainProgress], None]) -> None:
        """Fetch the losses of the last steps, log them and tell of them."""
        if not losses:
            return
        values = torch.stack(losses).tolist()
        seconds = (time.perf_counter() - since) / len(values)
        first = self._trainer.step_count - len(values) + 1
        for step, loss in enumerate(values, first):
            if not math.isfinite(loss):
                raise InvalidInput(
                    f"the loss is {loss} at step {step}; begin anew with lower learning rates; {self.what_is_kept()}"
                )
            self._log({"step": step, "loss": round(loss, 5), "seconds": round(seconds, 4)})
            if self._processes.is_first:
                on_progress(PretrainProgress(step, self._config.trainer.steps, loss, seconds))

    def _measure_alignment(self) -> None:
        if not self._processes.is_first:
            return  # the others wait for it in their next step
        tasks = choose_tasks(len(self._data.tasks), self._config.alignment_tasks, self._config.trainer.seed)
        alignment = gradient_alignment(self._trainer, [self._data.validation[task] for task in tasks])
        self._log({"step": self._trainer.step_count, "alignment": round(alignment, 5)})

    def _validate(self) -> dict[str, float]:
        """Mean loss of each task's held-out part, in nats per answer token; each process computes some."""
        losses = torch.zeros(len(self._data.tasks), device=self._trainer.device)
        for task in range(self._processes.rank, len(losses), self._processes.world_size):
            losses[task] = Validation.mean(self._trainer.validate([self._data.validation[task]])).loss
        values = self._processes.add_up(losses).tolist()
        return {task.task: round(loss, 4) for task, loss in zip(self._data.tasks, values, strict=True)}

    def _log(self, record: dict[str, object]) -> None:
        if self._processes.is_first:
            self._folder.log(record)


def make_learner(config: PretrainConfig, backbone: Backbone, num_tasks: int) -> RoutedLearner:
    """The learner of a run at its start. Raises InvalidInput for heads that divide not every linear."""
    inject(backbone.model)
    layout = config.layout
    sizes = linear_sizes(backbone.model)
    for linear, (d_in, d_out) in sizes.items():
        check_heads(linear, d_in, d_out, layout.num_heads)
    generator = torch.Generator().manual_seed(config.trainer.seed)
    num_skills = layout.skills_for(num_tasks)
    A, B = fresh_skills(sizes, layout.num_heads, num_skills, config.rank, generator)
    if layout.method is PretrainMethod.PRIVATE:
        A = {linear: _alike(skills) for linear, skills in A.items()}
    start = Inventory(A, B, config.alpha, backbone.fingerprint, backbone.name, config.prompt_format)
    if layout.method is PretrainMethod.PRIVATE:
        routing = torch.stack([one_hot_routing(*start.routing_shape, task) for task in range(num_tasks)])
    elif layout.method is PretrainMethod.SHARED:
        routing = torch.zeros(num_tasks, *start.routing_shape)
    else:
        routing = torch.stack([fresh_routing(*start.routing_shape, generator) for _ in range(num_tasks)])
    learner = RoutedLearner(start, routing, train_skills=True, train_routing=layout.learns_routing)
    return learner.to(backbone.device)


def _alike(skills: Tensor) -> Tensor:
    """skills (h, K, ., .), each as the first: those that begin apart would cancel in their mean.

    Source: Wortsman et al. 2022 (arXiv 2203.05482), who average the weights of models that began alike.
    """
    return skills[:, :1].expand_as(skills).contiguous()
