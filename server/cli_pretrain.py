"""Commands that pre-train an inventory and draw what such runs logged, without a server."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from server.cli_output import JsonFlag, TaskFolder, guarded, print_json, progress_bar
from server.errors import InvalidInput

if TYPE_CHECKING:
    from server.settings import Settings
    from server.training.distributed import Processes
    from server.training.pretrain_config import PretrainConfig
    from server.training.sampling import SamplingConfig

E = TypeVar("E", bound=StrEnum)
_ROWS_PER_TASK = 4

plot = typer.Typer(help="Pictures of what was logged; they need the extra `plot`.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(pretrain)
    app.add_typer(plot, name="plot")


@guarded
def pretrain(
    data: TaskFolder,
    out: Annotated[Path, typer.Option(help="Folder for the inventory, its card, log and checkpoints")],
    method: Annotated[
        str | None,
        typer.Option(help="mhr, poly, shared (one LoRA) or private (one a task); by --heads if left out"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences computed at once")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step")] = 1,
    skills: Annotated[int | None, typer.Option(min=1, help="K, adapters in the inventory  [default: 8]")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="h; 1 is Poly, more is MHR  [default: 8]")] = None,
    spread: Annotated[
        float | None,
        typer.Option(help="How far learnt skills are moved from their mean before they are saved  [default: 8]"),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="r")] = 4,
    alpha: Annotated[float, typer.Option(help="Scale of an adapter times its rank")] = 16.0,
    optimizer: Annotated[str, typer.Option(help="adamw or adafactor")] = "adamw",
    adapter_lr: Annotated[float, typer.Option(help="Peak learning rate of the skills")] = 1e-3,
    routing_lr: Annotated[float, typer.Option(help="Peak learning rate of the routing")] = 0.1,
    noise: Annotated[bool, typer.Option("--noise", help="Draw routing weights from a relaxed Bernoulli")] = False,
    task_sampling: Annotated[str, typer.Option(help="proportional, uniform or temperature")] = "proportional",
    temperature: Annotated[
        float | None, typer.Option(help="Draw a task by its size to the power of 1 / temperature  [default: 2]")
    ] = None,
    rows_per_task: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of a task that stand together; 4 if the batch size allows, else fewer"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps")] = 100,
    alignment_every: Annotated[int, typer.Option(min=0, help="Steps between measures of gradient alignment")] = 0,
    alignment_tasks: Annotated[int, typer.Option(min=2, help="Tasks that it is measured between")] = 8,
    as_json: JsonFlag = False,
) -> None:
    """Train an inventory on many tasks. Run it again with the same options to go on after an interruption.

    The backbone is MHR_BACKBONE; the device is MHR_DEVICE, or a GPU where there is one and it is not set.
    Several processes share each step when torchrun starts them: torchrun --nproc-per-node 2 -m server pretrain …
    """
    from server.settings import load_settings
    from server.training.distributed import joined_processes
    from server.training.optimizers import OptimizerName
    from server.training.pretrain_config import PretrainConfig, PretrainMethod, choose_layout
    from server.training.trainer import TrainerConfig

    named = None if method is None else _named(PretrainMethod, method, "method")
    config = PretrainConfig(
        data=data,
        out=out,
        layout=choose_layout(named, heads, skills, spread),
        rank=rank,
        alpha=alpha,
        batch_size=batch_size,
        accumulate=accumulate,
        sampling=_sampling(task_sampling, temperature, rows_per_task or math.gcd(_ROWS_PER_TASK, batch_size)),
        checkpoint_every=checkpoint_every,
        alignment_every=alignment_every,
        alignment_tasks=alignment_tasks,
        trainer=TrainerConfig(
            steps=steps,
            optimizer=_named(OptimizerName, optimizer, "optimizer"),
            adapter_lr=adapter_lr,
            routing_lr=routing_lr,
            noise=noise,
            seed=seed,
        ),
    )
    settings = load_settings()
    with joined_processes(_device(settings)) as (processes, device):
        path = _run(config, settings, processes, device, quiet=as_json)
    if not processes.is_first:
        return
    if as_json:
        print_json({"inventory": path, "card": out / "card.md", "log": out / "log.jsonl"})
    else:
        typer.echo(f"wrote {path}; import it with `mhr inventory import {path} --name NAME`")


@plot.command("alignment")
@guarded
def plot_alignment(
    runs: Annotated[list[Path], typer.Argument(exists=True, file_okay=False, help="Folders of `mhr pretrain --out`")],
    out: Annotated[Path, typer.Option(help="A .png, .svg or .pdf file")],
) -> None:
    """Draw the gradient alignment of pre-training runs over their steps, one line a run."""
    from server.training.alignment_plot import draw_alignment

    draw_alignment(runs, out)
    typer.echo(f"wrote {out}")


def _run(config: PretrainConfig, settings: Settings, processes: Processes, device: str, *, quiet: bool) -> Path | None:
    from server.backbone import load_backbone, training_dtype
    from server.training.pretrain import PretrainProgress
    from server.training.pretrain import pretrain as run

    backbone = load_backbone(settings.backbone, settings.data_dir, device, training_dtype(device))
    quiet = quiet or not processes.is_first
    with progress_bar("pre-training", config.trainer.steps, quiet=quiet) as (bar, row):

        def show(progress: PretrainProgress) -> None:
            bar.update(row, completed=progress.step, description=f"pre-training, loss {progress.loss:.3f}")

        return run(config, backbone, processes=processes, on_progress=show)


def _device(settings: Settings) -> str:
    import torch

    if "device" not in settings.model_fields_set and torch.cuda.is_available():
        return "cuda"
    return settings.device


def _sampling(tasks: str, temperature: float | None, rows_per_task: int) -> SamplingConfig:
    from server.training.sampling import SamplingConfig, TaskSampling

    sampling = _named(TaskSampling, tasks, "task_sampling")
    if temperature is None:
        return SamplingConfig(sampling, rows_per_task=rows_per_task)
    if sampling is not TaskSampling.TEMPERATURE:
        raise InvalidInput(
            f"a temperature is for task sampling by temperature, not {tasks}; leave one out", param="temperature"
        )
    return SamplingConfig(sampling, temperature, rows_per_task)


def _named(choices: type[E], value: str, option: str) -> E:
    try:
        return choices(value)
    except ValueError:
        known = ", ".join(choices)
        raise InvalidInput(f"unknown {option} {value!r}; choose among {known}", param=option) from None
