"""The command that pre-trains an inventory, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli_output import JsonFlag, TaskFolder, guarded, print_json, progress_bar


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(pretrain)


@guarded
def pretrain(
    data: TaskFolder,
    out: Annotated[Path, typer.Option(help="Folder for the inventory, its card, log and checkpoint")],
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step")] = 16,
    skills: Annotated[int, typer.Option(min=1, help="K, adapters in the inventory")] = 8,
    heads: Annotated[int, typer.Option(min=1, help="h; 1 is Poly, more is MHR")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="r")] = 4,
    alpha: Annotated[float, typer.Option(help="Scale of an adapter times its rank")] = 16.0,
    adapter_lr: Annotated[float, typer.Option(help="Peak learning rate of the skills")] = 2e-3,
    routing_lr: Annotated[float, typer.Option(help="Peak learning rate of the routing")] = 0.1,
    noise: Annotated[bool, typer.Option("--noise", help="Draw routing weights from a relaxed Bernoulli")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps")] = 100,
    as_json: JsonFlag = False,
) -> None:
    """Train an inventory on many tasks. Run it again with the same options to go on after an interruption.

    The backbone is MHR_BACKBONE, the device MHR_DEVICE.
    """
    from server.backbone import load_backbone, training_dtype
    from server.settings import load_settings
    from server.training.pretrain import PretrainConfig, PretrainProgress
    from server.training.pretrain import pretrain as run
    from server.training.trainer import TrainerConfig

    trainer = TrainerConfig(steps=steps, adapter_lr=adapter_lr, routing_lr=routing_lr, noise=noise, seed=seed)
    config = PretrainConfig(
        data=data,
        out=out,
        num_skills=skills,
        num_heads=heads,
        rank=rank,
        alpha=alpha,
        batch_size=batch_size,
        checkpoint_every=checkpoint_every,
        trainer=trainer,
    )
    settings = load_settings()
    backbone = load_backbone(settings.backbone, settings.data_dir, settings.device, training_dtype(settings.device))
    with progress_bar("pre-training", steps, quiet=as_json) as (bar, row):

        def show(progress: PretrainProgress) -> None:
            bar.update(row, completed=progress.step, description=f"pre-training, loss {progress.loss:.3f}")

        path = run(config, backbone, on_progress=show)
    if as_json:
        print_json({"inventory": path, "card": out / "card.md", "log": out / "log.jsonl"})
    else:
        typer.echo(f"wrote {path}; import it with `mhr inventory import {path} --name NAME`")
