"""Commands that work on a data directory: inventory and store. The server may run meanwhile."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli_output import JsonFlag, fail, guarded, print_fields, print_json, print_table

if TYPE_CHECKING:
    from adapters_store.store import Store

inventory = typer.Typer(help="Inventories of a data directory.", no_args_is_help=True)
store = typer.Typer(help="Upkeep of a data directory.", no_args_is_help=True)

DataDir = Annotated[Path | None, typer.Option(help="MHR_DATA_DIR")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(inventory, name="inventory")
    app.add_typer(store, name="store")


def _open(data_dir: Path | None) -> Store:
    from adapters_store.store import Store
    from server.settings import load_settings

    settings = load_settings(data_dir=data_dir)
    return Store.open(settings.data_dir, settings.database())


@inventory.command("import")
@guarded
def import_inventory(
    paths: Annotated[
        list[Path],
        typer.Argument(exists=True, help="An inventory file, a PEFT Poly directory, or several PEFT LoRA directories"),
    ],
    name: Annotated[str, typer.Option(help="The inventory's name")],
    task_names: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="One task name a line, for a PEFT checkpoint's tasks"),
    ] = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Add an inventory and the tasks that it brings. It must belong to MHR_BACKBONE."""
    from server.importing import import_paths
    from server.settings import load_settings

    names = None if task_names is None else [n for n in task_names.read_text(encoding="utf-8").split("\n") if n.strip()]
    settings = load_settings(data_dir=data_dir)
    with closing(_open(data_dir)) as opened:
        imported = import_paths(opened, settings, paths, name, names)
    if as_json:
        print_json(asdict(imported.record) | {"tasks": imported.tasks})
    else:
        typer.echo(f"imported {name} ({imported.record.size_bytes} bytes) with {len(imported.tasks)} tasks")


@inventory.command("list")
@guarded
def list_inventories(data_dir: DataDir = None, as_json: JsonFlag = False) -> None:
    """All inventories."""
    with closing(_open(data_dir)) as opened:
        records = opened.list_inventories()
    if as_json:
        print_json([asdict(record) for record in records])
        return
    print_table(
        ("inventory", "skills", "heads", "rank", "bytes", "backbone", "created"),
        (
            (
                r.name,
                r.num_skills,
                r.num_heads,
                r.rank,
                r.size_bytes,
                r.metadata.get("backbone_name", r.backbone_fingerprint[:12]),
                r.created_at,
            )
            for r in records
        ),
    )


@inventory.command("show")
@guarded
def show_inventory(
    name: Annotated[str, typer.Argument(metavar="NAME_OR_PATH", help="A stored inventory, or an inventory file")],
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the routing of its tasks to this .png, .svg or .pdf")
    ] = None,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """One inventory, with how its tasks are routed: entropy in nats and as a fraction of ln K, use of each skill."""
    from server.adapters.inventory import Inventory
    from server.adapters.routing_plot import plot_routing
    from server.adapters.routing_statistics import RoutingStatistics
    from server.plotting import check_plot_file

    if plot is not None:
        check_plot_file(plot)
    fields, data = _file_fields(Path(name)) if Path(name).is_file() else _stored_fields(name, data_dir)
    statistics = RoutingStatistics.of(Inventory.from_bytes(data))
    if plot is not None:
        if statistics is None:
            fail(f"{name} brings no tasks, so there is no routing to draw")
        plot_routing(statistics, plot)
    routing = None if statistics is None else statistics.as_document()
    if as_json:
        print_json(fields | {"routing": routing})
        return
    print_fields(fields)
    if routing is not None:
        _print_routing(routing)


def _stored_fields(name: str, data_dir: Path | None) -> tuple[dict[str, Any], bytes]:
    """What is known of a stored inventory, and its document."""
    with closing(_open(data_dir)) as opened:
        record = opened.get_inventory(name)
        return asdict(record), opened.blobs.get(record.digest)


def _file_fields(path: Path) -> tuple[dict[str, Any], bytes]:
    """The same of an inventory file."""
    from adapters_store.blobs import digest_of
    from server.adapters.inventory import Inventory
    from server.inventories import catalog_fields

    data = path.read_bytes()
    about = catalog_fields(Inventory.from_bytes(data))
    return {"name": path.stem, "digest": digest_of(data), "size_bytes": len(data)} | about, data


def _print_routing(routing: dict[str, Any]) -> None:
    uses = ", ".join(f"{use:.3f}" for use in routing["skill_use"])
    typer.echo(f"\nrouting of {len(routing['tasks'])} tasks; use of the skills: {uses}")
    rows = [(task, about["entropy"], about["entropy_fraction"]) for task, about in routing["tasks"].items()]
    rows.append(("mean", routing["entropy"], routing["entropy_fraction"]))
    print_table(
        ("task", "entropy, nats", "of ln K"),
        ((task, f"{entropy:.3f}", f"{fraction:.3f}") for task, entropy, fraction in rows),
    )


@inventory.command("verify")
@guarded
def verify_inventory(name: str, data_dir: DataDir = None, as_json: JsonFlag = False) -> None:
    """Read an inventory and assemble each of its tasks; names the first problem."""
    from server.importing import check_inventory

    with closing(_open(data_dir)) as opened:
        tasks = check_inventory(opened, name)
    if as_json:
        print_json({"name": name, "sound": True, "tasks": tasks})
    else:
        typer.echo(f"{name} is sound; {len(tasks)} tasks assemble")


@store.command("verify")
@guarded
def verify(data_dir: DataDir = None, as_json: JsonFlag = False) -> None:
    """Check every blob against its digest; exit code 1 when something is damaged."""
    with closing(_open(data_dir)) as opened:
        damages = opened.verify()
    if as_json:
        print_json([asdict(damage) for damage in damages])
    else:
        for damage in damages:
            typer.echo(str(damage))
    if damages:
        fail(f"{len(damages)} damaged; restore the files from a backup, or import or adapt again")
    if not as_json:
        typer.echo("all sound")


@store.command("gc")
@guarded
def gc(
    min_age_s: Annotated[float, typer.Option(min=0, help="Leave blobs younger than this many seconds")] = 3600.0,
    data_dir: DataDir = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what nothing refers to: orphan blobs, old temporary files, checkpoints of finished jobs."""
    with closing(_open(data_dir)) as opened:
        report = opened.gc(min_age_s)
    if as_json:
        print_json(asdict(report))
    else:
        print_fields(asdict(report))


@store.command("backup")
@guarded
def backup(target: Path, data_dir: DataDir = None, as_json: JsonFlag = False) -> None:
    """Write a consistent copy of catalog and blobs to a directory."""
    with closing(_open(data_dir)) as opened:
        report = opened.backup(target)
    if as_json:
        print_json(asdict(report))
    else:
        typer.echo(f"wrote {report.blobs} blobs, {report.size_bytes} bytes, to {report.path}")
        for damage in report.damaged:
            typer.echo(f"not copied, {damage}", err=True)
    if report.damaged:
        raise typer.Exit(1)
