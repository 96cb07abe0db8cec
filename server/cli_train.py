"""Commands that train and evaluate without a server: pretrain, evaluate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_output import JsonFlag, fail, guarded, print_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from server.adapters.inventory import Inventory
    from server.training.adapt import Hyperparameters

DataDir = Annotated[
    Path, typer.Option("--data", exists=True, file_okay=False, help="Folder of *.json or *.jsonl tasks")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(pretrain)
    app.command()(evaluate)


@guarded
def pretrain(
    data: DataDir,
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
    with _progress("pre-training", steps, quiet=as_json) as (bar, row):

        def show(progress: PretrainProgress) -> None:
            bar.update(row, completed=progress.step, description=f"pre-training, loss {progress.loss:.3f}")

        path = run(config, backbone, on_progress=show)
    if as_json:
        print_json({"inventory": path, "card": out / "card.md", "log": out / "log.jsonl"})
    else:
        typer.echo(f"wrote {path}; import it with `mhr inventory import {path} --name NAME`")


@guarded
def evaluate(
    data: DataDir,
    inventory: Annotated[str | None, typer.Option(help="An inventory file, or the name of a stored one")] = None,
    methods: Annotated[str, typer.Option(help="Of base, mu and the methods of /adapt, with commas")] = "base,mu,mhr",
    examples: Annotated[int, typer.Option(min=2, help="Examples to learn from, a quarter held out")] = 24,
    instances: Annotated[int, typer.Option(min=1, help="Other instances to answer and score")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of examples and instances")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    hyperparameters: Annotated[str, typer.Option(help="JSON, as in /adapt")] = "{}",
    out: Annotated[Path | None, typer.Option(help="File for the scores as JSON")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods on tasks: adapt on a few examples, answer other instances, score them with ROUGE-L."""
    from server.backbone import load_backbone, training_dtype
    from server.settings import load_settings
    from server.training.evaluate import EvaluateConfig, Score, as_document, table
    from server.training.evaluate import evaluate as run

    config = EvaluateConfig(
        data=data,
        methods=tuple(methods.split(",")),
        num_examples=examples,
        num_instances=instances,
        max_new_tokens=max_new_tokens,
        seeds=tuple(range(seeds)),
        hyperparameters=_hyperparameters(hyperparameters),
    )
    settings = load_settings()
    serving = load_backbone(settings.backbone, settings.data_dir, settings.device)
    training = load_backbone(settings.backbone, settings.data_dir, settings.device, training_dtype(settings.device))
    tasks = sum(1 for path in data.iterdir() if path.suffix in (".json", ".jsonl"))
    with _progress("evaluating", tasks * seeds * len(config.methods), quiet=as_json) as (bar, row):

        def show(score: Score) -> None:
            bar.advance(row)
            bar.console.print(f"{score.task}  {score.method}  seed {score.seed}  ROUGE-L {score.rouge_l:.1f}")

        scores = run(config, training, serving, None if inventory is None else _inventory(inventory), show)
    document = as_document(config, scores)
    if out is not None:
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(document)
    else:
        typer.echo(table(scores))


def _hyperparameters(text: str) -> Hyperparameters:
    from pydantic import ValidationError

    from server.training.adapt import Hyperparameters

    try:
        return Hyperparameters.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        fail(f"--hyperparameters: {'.'.join(map(str, first['loc']))}: {first['msg']}")


def _inventory(source: str) -> Inventory:
    """An inventory file, or else a name in the data directory."""
    from adapters_store.store import Store
    from server.adapters.inventory import Inventory
    from server.settings import load_settings

    if Path(source).is_file():
        return Inventory.from_bytes(Path(source).read_bytes())
    settings = load_settings()
    with Store.open(settings.data_dir, settings.database()) as store:
        return Inventory.from_bytes(store.blobs.get(store.get_inventory(source).digest))


@contextmanager
def _progress(title: str, total: int, *, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        yield bar, bar.add_task(title, total=total)
