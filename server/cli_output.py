"""What the commands share: errors as one line, JSON for machines, tables for people."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

P = ParamSpec("P")
R = TypeVar("R")

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine output")]
TaskFolder = Annotated[
    Path, typer.Option("--data", exists=True, file_okay=False, help="Folder of *.json or *.jsonl tasks")
]


def fail(message: str) -> NoReturn:
    """End with exit code 1 and the reason on stderr."""
    typer.echo(f"mhr: {message}", err=True)
    raise typer.Exit(1)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Errors that carry a remedy become one line; anything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from adapters_store.errors import StoreError
        from mhr_client.errors import MHRClientError
        from server.errors import MHRError

        try:
            return command(*args, **kwargs)
        except MHRError as error:
            fail(error.message)
        except (StoreError, MHRClientError) as error:
            fail(str(error))
        except BrokenPipeError:
            # The reader of our output went away, e.g. `mhr tasks list | head`.
            sys.stderr.close()
            raise typer.Exit(0) from None

    return run


def print_json(value: Any) -> None:
    """One JSON document; dates and paths as text."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table, cut to the terminal's width only where there is a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False).print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """One `name  value` a line; documents as JSON."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else value
        typer.echo(f"{name:<{width}}  {'' if text is None else text}")


def shorten(text: str, length: int = 60) -> str:
    """The text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


@contextmanager
def progress_bar(title: str, total: int, *, quiet: bool) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar on stderr and its one row; `quiet` shows nothing."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        yield bar, bar.add_task(title, total=total)
