"""The command line `mhr`. Heavy modules are imported inside the commands, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server import __version__, cli_evaluate, cli_http, cli_pretrain, cli_store
from server.cli_output import fail, guarded

app = typer.Typer(
    name="mhr",
    help="One backbone, a learned inventory of adapters, and tasks that are small routings over it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
cli_http.add_to(app)
cli_store.add_to(app)
cli_pretrain.add_to(app)
cli_evaluate.add_to(app)


def main() -> None:
    """The entry point."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mhr {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    """Every setting of the server is an environment variable MHR_*; see docs/operations.md."""


@app.command()
@guarded
def serve(
    host: Annotated[str | None, typer.Option(help="MHR_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="MHR_PORT")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="MHR_DATA_DIR")] = None,
    backbone: Annotated[str | None, typer.Option(help="MHR_BACKBONE")] = None,
    inventory: Annotated[str | None, typer.Option(help="MHR_INVENTORY")] = None,
    device: Annotated[str | None, typer.Option(help="MHR_DEVICE")] = None,
    dtype: Annotated[str | None, typer.Option(help="MHR_DTYPE")] = None,
    max_batch: Annotated[int | None, typer.Option(help="MHR_MAX_BATCH")] = None,
    threads: Annotated[int | None, typer.Option(help="MHR_THREADS")] = None,
    log_level: Annotated[str | None, typer.Option(help="MHR_LOG_LEVEL")] = None,
) -> None:
    """Start the server and its adaptation worker. Options win over the environment."""
    from server.logs import configure_logging
    from server.settings import load_settings

    settings = load_settings(
        host=host,
        port=port,
        data_dir=data_dir,
        backbone=backbone,
        inventory=inventory,
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        threads=threads,
        log_level=log_level,
    )
    configure_logging(settings.log_level)
    from server.serving import serve as serve_until_signal

    failure = serve_until_signal(settings)
    if failure is not None:
        fail(str(failure))


@app.command(hidden=True)
@guarded
def worker(
    with_parent: Annotated[bool, typer.Option(help="End when standard input is closed")] = False,
) -> None:
    """Run adaptation jobs; `mhr serve` starts this by itself."""
    from server.logs import configure_logging
    from server.settings import load_settings
    from server.supervisor import compute_when_idle, end_with_parent

    settings = load_settings()
    configure_logging(settings.log_level)
    if with_parent:
        end_with_parent()
        compute_when_idle()
    from server.worker_process import run

    run(settings)
