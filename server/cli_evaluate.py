"""Commands that compare methods on tasks, without a server: evaluate, evaluate-report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_output import JsonFlag, TaskFolder, fail, guarded, print_json, progress_bar

if TYPE_CHECKING:
    from server.training.scores import RunSettings, Score

PlotFile = Annotated[
    Path | None, typer.Option("--plot", dir_okay=False, help="Draw the scores to this .png, .svg or .pdf")
]
Against = Annotated[str | None, typer.Option(help="Show how far each method is ahead of this one, draw by draw")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(evaluate)
    app.command("evaluate-report")(evaluate_report)


@guarded
def evaluate(
    data: TaskFolder,
    methods: Annotated[
        str,
        typer.Option(help="Of base, demos, mu and the methods of /adapt, with commas; METHOD@NAME names inventories"),
    ] = "base,mu,mhr",
    inventory: Annotated[
        list[str] | None,
        typer.Option(help="An inventory file or the name of a stored one; NAME=… for METHOD@NAME. Repeatable"),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of the folder's tasks, with commas; all by default")] = None,
    examples: Annotated[str, typer.Option(help="Examples to learn from; several numbers with commas")] = "24",
    instances: Annotated[int, typer.Option(min=1, help="Other instances to answer and score")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of examples and instances")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest generated answer")] = 64,
    max_context: Annotated[
        int, typer.Option(min=16, help="Tokens of a prompt with its demonstrations and answer")
    ] = 2048,
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Part of the examples held out for early stopping")
    ] = 0.25,
    hyperparameters: Annotated[
        list[str] | None, typer.Option(help="JSON as in /adapt for all methods, or METHOD={…}. Repeatable")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a backbone of its own")] = 1,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the scores; run again with the same to go on")
    ] = None,
    against: Against = None,
    plot: PlotFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare methods on tasks: adapt on a few examples, answer other instances, score the answers.

    The folder holds task files as for pre-training, scored with ROUGE-L, or rank-classification sets, scored with
    accuracy. The backbone is MHR_BACKBONE, the device MHR_DEVICE.
    """
    from server.plotting import check_plot_file
    from server.settings import load_settings
    from server.training.evaluate import evaluate as run
    from server.training.evaluation_plan import BackboneSource, EvaluateConfig
    from server.training.scores import read_scores

    if plot is not None:
        check_plot_file(plot)
    columns = _listed(methods)
    if against is not None and against not in columns:
        fail(f"--against: {against!r} is not among --methods; name one of {', '.join(columns)}")
    settings = load_settings()
    config = EvaluateConfig(
        data=data,
        backbone=BackboneSource(settings.backbone, settings.data_dir, settings.device),
        methods=tuple(columns),
        inventories=_inventories(inventory or []),
        tasks=None if tasks is None else tuple(_listed(tasks)),
        num_examples=tuple(_number(text) for text in _listed(examples)),
        num_instances=instances,
        seeds=tuple(range(seeds)),
        max_new_tokens=max_new_tokens,
        max_context=max_context,
        validation_fraction=validation_fraction,
        hyperparameters=_hyperparameters(hyperparameters or []),
    )
    with _folder(out) as folder, progress_bar("evaluating", 0, quiet=as_json) as (bar, row):

        def begin(done: int, total: int) -> None:
            bar.update(row, completed=done, total=total)

        def show(score: Score) -> None:
            bar.advance(row)
            bar.console.print(f"{score.task}  {score.method}  seed {score.seed}  {score.metric} {score.score:.1f}")

        scores = run(config, Path(folder), workers, begin, show)
        recorded, _ = read_scores([Path(folder)])
    _show(recorded, scores, against, plot, as_json=as_json)


@guarded
def evaluate_report(
    runs: Annotated[
        list[Path], typer.Argument(exists=True, file_okay=False, help="Folders that `mhr evaluate --out` wrote")
    ],
    against: Against = None,
    plot: PlotFile = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the scores of one or several runs, finished or not, as one table for each number of examples.

    Runs are put together where their settings agree; of a score that two of them have, the first stands.
    """
    from server.training.scores import read_scores

    settings, scores = read_scores(runs)
    _show(settings, scores, against, plot, as_json=as_json)


def _show(
    settings: RunSettings, scores: Sequence[Score], against: str | None, plot: Path | None, *, as_json: bool
) -> None:
    from server.training.report import as_document, as_markdown, make_tables
    from server.training.report_plot import plot_tables

    tables = make_tables(scores, against)
    if plot is not None:
        plot_tables(tables, plot)
    if as_json:
        print_json(as_document(settings, scores, tables))
    else:
        typer.echo(as_markdown(tables))


def _folder(out: Path | None) -> AbstractContextManager[Any]:
    return TemporaryDirectory(prefix="mhr-evaluate-") if out is None else nullcontext(out)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> int:
    if not text.isdigit():
        fail(f"--examples: {text!r} is not a number; write for example 8,32")
    return int(text)


def _inventories(given: Sequence[str]) -> dict[str, bytes]:
    """{name: document} of PATH and NAME=PATH."""
    from server.training.columns import UNNAMED, is_inventory_name

    inventories: dict[str, bytes] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals or not is_inventory_name(name):
            name, source = UNNAMED, text
        if name in inventories:
            fail(f"--inventory: {name or 'an inventory without a name'} is given twice; write NAME=PATH for others")
        inventories[name] = _read_inventory(source)
    return inventories


def _read_inventory(source: str) -> bytes:
    """An inventory file's bytes, or those of a name in the data directory."""
    if Path(source).is_file():
        return Path(source).read_bytes()
    from adapters_store.store import Store
    from server.settings import load_settings

    settings = load_settings()
    with Store.open(settings.data_dir, settings.database()) as store:
        return store.blobs.get(store.get_inventory(source).digest)


def _hyperparameters(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{method: values} of {…} and METHOD={…}; "" is for all."""
    found: dict[str, dict[str, Any]] = {}
    for text in given:
        method, _, values = ("", "", text) if text.lstrip().startswith("{") else text.partition("=")
        try:
            parsed = json.loads(values)
        except ValueError as error:
            fail(f"--hyperparameters: {text!r} is not JSON or METHOD=JSON: {error}")
        if not isinstance(parsed, dict):
            fail(f'--hyperparameters: {text!r} is not an object; write for example mhr={{"steps": 100}}')
        found[method] = found.get(method, {}) | parsed
    return found
