"""What the documents say about settings, metrics, routes and hyperparameters is what the code has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from fastapi.routing import APIRoute
from prometheus_client import Counter, Gauge, Histogram
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from server.adapters.cache import AdapterCache
from server.api import adapt, generate, inventories, jobs, ops, tasks
from server.api.errors import BadRequest, MethodNotAllowed
from server.api.schemas import AdaptRequest, Parameters
from server.cli import app
from server.engine.merged import MergedStats
from server.errors import MHRError
from server.metrics import Metrics
from server.settings import Settings, env_name
from server.training.methods import Hyperparameters, Method

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "clients" / "python" / "README.md", *(ROOT / "docs").rglob("*.md")]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def _rows(text: str, first_cell: str) -> list[list[str]]:
    """The cells of every table row whose first cell matches, without backticks."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [[cell.replace("`", "") for cell in row] for row in rows if re.fullmatch(first_cell, row[0])]


def _shown(field: FieldInfo) -> str:
    if field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {row[0]: row[1] for row in _rows(OPERATIONS, r"`MHR_[A-Z_]+`")}
    assert documented == {env_name(name): _shown(field) for name, field in Settings.model_fields.items()}


def test_every_metric_is_documented_with_its_labels() -> None:
    metrics = Metrics()
    metrics.watch_adapter_cache(AdapterCache(0).stats, lambda: MergedStats(entries=0, bytes=0, evictions=0))
    documented = {row[0]: row[1] for row in _rows(OPERATIONS, r"`mhr_[a-z_]+`")}
    declared = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.registry.collect()}
    assert set(documented) == declared
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            name = metric._name + ("_total" if isinstance(metric, Counter) else "")
            assert documented[name] == ", ".join(metric._labelnames)


def test_every_route_is_documented() -> None:
    resources = (adapt, generate, inventories, jobs, ops, tasks)
    routes = [route for resource in resources for route in resource.router.routes if isinstance(route, APIRoute)]
    served = {re.sub(r"\{\w+\}", "{}", f"{method} {route.path}") for route in routes for method in route.methods}
    documented = re.findall(r"^### `([A-Z]+ /\S+)`$", API, flags=re.MULTILINE)
    assert sorted(re.sub(r"\{\w+\}", "{}", line) for line in documented) == sorted(served)


def test_every_error_is_documented_with_its_status() -> None:
    documented = {(int(row[0]), kind) for row in _rows(API, r"\d{3}") for kind in row[1].split(", ")}
    known = {(error.status, error.type) for error in _subclasses(MHRError)}
    assert documented == known | {(error.status, error.type) for error in (BadRequest, MethodNotAllowed)}


def test_every_generation_parameter_is_documented() -> None:
    names = {row[0] for row in _rows(API.split("| parameter |")[1].split("\n\n")[0], r"`\w+`")}
    assert names == Parameters.model_fields.keys()


def test_every_field_of_an_adaptation_is_documented() -> None:
    section = API.split("### `POST /adapt`")[1]
    names = {row[0] for row in _rows(section.split("| field |")[1].split("\n\n")[0], r"`\w+`")}
    assert names == AdaptRequest.model_fields.keys()
    defaults = {row[0]: row[1] for row in _rows(section.split("| hyperparameter |")[1].split("\n\n")[0], r"`\w+`")}
    assert defaults == {name: _shown(field) for name, field in Hyperparameters.model_fields.items()}
    methods = {name for row in _rows(section, r"`(mhr|poly|lora).*`.*") for name in row[0].split(", ")}
    assert methods == set(Method)


def _subclasses(cls: type[MHRError]) -> set[type[MHRError]]:
    """The class and all below it that are part of the server's own tree."""
    found = {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))
    return {error for error in found if error.__module__ == "server.errors"}


def _command_lines() -> list[str]:
    """Every call of `mhr` in a shell block, one line each."""
    blocks = [
        block for path in DOCUMENTS for block in re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    ]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return sorted({line.split(" #")[0] for line in lines if re.match(r"(\.venv/bin/)?mhr ", line)})


@pytest.mark.parametrize("line", _command_lines())
def test_every_command_line_shown_exists(line: str) -> None:
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_every_alert_is_documented() -> None:
    alerts = re.findall(r"- alert: (\w+)", (ROOT / "deploy" / "alerts.yml").read_text(encoding="utf-8"))
    assert [row[0] for row in _rows(OPERATIONS, r"`MHR[A-Z][a-z]\w+`")] == alerts


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "clients/python/README.md",
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if file.startswith(("http://", "https://")):
            continue
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_exist(path: Path) -> None:
    pattern = r"`((?:server|adapters_store|clients|inventories|tests|benchmarks|deploy|docs)/[\w./-]+\.\w+)`"
    for name in re.findall(pattern, path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
