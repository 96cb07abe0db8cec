"""Who may import whom. Read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_DIRS = {"server": ROOT, "adapters_store": ROOT, "mhr_client": ROOT / "clients" / "python"}
TORCH_FREE = ("server.errors", "server.engine.request", "server.engine.scheduler", "server.engine.kv_cache")

# Imported by name, and always there because the package that is meant by it depends on it.
BROUGHT_ALONG = {"starlette": "fastapi"}

# Imported where it is used, by one module that says which extra to install.
OPTIONAL = {"matplotlib": "server.plotting"}


def _module_name(path: Path, base: Path) -> str:
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement below `node` that runs, i.e. not those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and _is_type_checking(child):
            for other in child.orelse:
                yield from _import_nodes(other)
        else:
            yield from _import_nodes(child)


def imported_names(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of the modules (or members of modules) that `source` imports."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names: set[str] = set()
    for node in _import_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            start = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def _read_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for package, base in SOURCE_DIRS.items():
        for path in sorted((base / package).rglob("*.py")):
            module = _module_name(path, base)
            graph[module] = imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    return graph


GRAPH = _read_graph()


def _belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _modules_of(package: str) -> list[str]:
    return [module for module in GRAPH if _belongs(module, package)]


def _loaded_with(name: str) -> set[str]:
    """Modules of ours that importing `name` runs: itself (or the module it is a member of) and its packages."""
    parts = name.split(".")
    return {prefix for i in range(1, len(parts) + 1) if (prefix := ".".join(parts[:i])) in GRAPH}


def _path_to(module: str, forbidden: str) -> list[str] | None:
    """The chain of imports by which `module` loads `forbidden`, or None."""
    chains = [[loaded] for loaded in sorted(_loaded_with(module))]
    seen = _loaded_with(module)
    while chains:
        chain = chains.pop()
        for name in sorted(GRAPH[chain[-1]]):
            if _belongs(name, forbidden):
                return [*chain, name]
            for loaded in sorted(_loaded_with(name) - seen):
                seen.add(loaded)
                chains.append([*chain, loaded])
    return None


def test_source_was_read() -> None:
    assert {"server.errors", "server.adapters.inventory", "mhr_client"} <= GRAPH.keys()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {"torch.nn"}),
        ("from . import x", {"server.engine.x"}),
        ("from ..errors import MHRError", {"server.errors.MHRError"}),
        ("def f():\n    import fastapi", {"fastapi"}),
        ("if TYPE_CHECKING:\n    import torch", set()),
    ],
)
def test_reading_of_imports(source: str, expected: set[str]) -> None:
    assert imported_names(source, "server.engine.engine", is_package=False) == expected


@pytest.mark.parametrize("module", _modules_of("adapters_store"))
def test_store_imports_nothing_of_ours(module: str) -> None:
    ours = {name for name in GRAPH[module] if _belongs(name, "server") or _belongs(name, "mhr_client")}
    assert not ours
    assert not any(_belongs(name, "torch") for name in GRAPH[module])


@pytest.mark.parametrize("module", _modules_of("mhr_client"))
def test_client_imports_only_httpx_and_the_standard_library(module: str) -> None:
    tops = {name.split(".")[0] for name in GRAPH[module]}
    assert tops <= {"mhr_client", "httpx"} | sys.stdlib_module_names


@pytest.mark.parametrize("module", _modules_of("server.engine") + _modules_of("server.training"))
@pytest.mark.parametrize("forbidden", ["fastapi", "server.api"])
def test_engine_and_training_know_no_http(module: str, forbidden: str) -> None:
    assert _path_to(module, forbidden) is None


def _declared_dependencies(path: str) -> set[str]:
    project = tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["project"]
    return {_normal(re.split(r"[\[<>=]", requirement)[0]) for requirement in project["dependencies"]}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_import_is_a_declared_dependency() -> None:
    """What is imported in `server` and `adapters_store` outside of tests must be installed with them."""
    declared = _declared_dependencies("pyproject.toml")
    of_module = packages_distributions()
    modules = _modules_of("server") + _modules_of("adapters_store")
    tops = {name.split(".")[0] for module in modules for name in GRAPH[module]}
    foreign = tops - sys.stdlib_module_names - set(SOURCE_DIRS)
    undeclared = {top for top in foreign if not {_normal(name) for name in of_module.get(top, [top])} & declared}
    assert undeclared <= BROUGHT_ALONG.keys() | OPTIONAL.keys()


@pytest.mark.parametrize(("package", "module"), OPTIONAL.items())
def test_only_one_module_imports_an_optional_package(package: str, module: str) -> None:
    assert {user for user, names in GRAPH.items() if any(_belongs(name, package) for name in names)} == {module}


def test_only_metrics_imports_prometheus_client() -> None:
    users = {module for module, names in GRAPH.items() if any(_belongs(name, "prometheus_client") for name in names)}
    assert users <= {"server.metrics"}


@pytest.mark.parametrize("module", [module for module in TORCH_FREE if module in GRAPH])
def test_scheduling_and_accounting_import_no_torch(module: str) -> None:
    assert _path_to(module, "torch") is None
