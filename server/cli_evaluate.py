"""The command that compares methods on tasks, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli_output import JsonFlag, TaskFolder, fail, guarded, print_json, progress_bar

if TYPE_CHECKING:
    from server.adapters.inventory import Inventory
    from server.training.adapt import Hyperparameters


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(evaluate)


@guarded
def evaluate(
    data: TaskFolder,
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
    with progress_bar("evaluating", tasks * seeds * len(config.methods), quiet=as_json) as (bar, row):

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
