"""Dockerfile and docker-compose.yml: what can be told without a container engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import load_settings

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = [
    line for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines() if line.strip() and not line.startswith("#")
]


def _compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_everything_copied_exists_and_reaches_the_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in INSTRUCTIONS:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert any(source == name or source.startswith(f"{name}/") for name in allowed)


def test_runs_as_a_user_of_its_own_with_a_health_check() -> None:
    last_stage = INSTRUCTIONS[max(i for i, line in enumerate(INSTRUCTIONS) if line.startswith("FROM")) :]
    assert "USER mhr" in last_stage
    check = next(line for line in last_stage if line.startswith("HEALTHCHECK"))
    assert "/healthz" in check
    assert "curl" not in DOCKERFILE
    assert INSTRUCTIONS[-1] == 'CMD ["mhr", "serve"]'


@pytest.fixture
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings of this machine."""
    for name in [name for name in os.environ if name.startswith("MHR_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_settings_in_the_image_and_in_compose_are_settings(clean_environ: pytest.MonkeyPatch) -> None:
    environment = _compose()["services"]["server"].get("environment", {})
    for name, value in [*re.findall(r"\b(MHR_[A-Z_]+)=(\S+)", DOCKERFILE), *environment.items()]:
        clean_environ.setenv(name, value)
    settings = load_settings()
    assert (settings.host, settings.port, settings.data_dir) == ("0.0.0.0", 8000, Path("/data"))


def test_compose_mounts_exist_and_ports_stay_on_this_machine() -> None:
    services = _compose()["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    named = set(_compose()["volumes"])
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in named or (ROOT / source).exists()
    assert services["server"]["volumes"] == ["mhr-data:/data"]


@pytest.mark.usefixtures("clean_environ")
def test_compose_waits_longer_than_the_server_drains() -> None:
    grace = _compose()["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > load_settings().drain_timeout_s


def test_every_dependency_is_pinned() -> None:
    pins = {name.lower() for name in _pins()}
    for path in ("pyproject.toml", "clients/python/pyproject.toml"):
        project = tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {}).values()
        for requirement in [*project["dependencies"], *(item for extra in extras for item in extra)]:
            name = re.split(r"[\[<>=]", requirement)[0].lower()
            assert name in pins | {"mhr-client"}


def test_nothing_is_pinned_to_one_machine() -> None:
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in _pins().values())


def test_client_and_server_have_one_version() -> None:
    versions = {
        tomllib.loads((ROOT / path).read_text(encoding="utf-8"))["project"]["version"]
        for path in ("pyproject.toml", "clients/python/pyproject.toml")
    }
    assert len(versions) == 1


def test_health_check_is_a_program_that_fails_where_nothing_listens() -> None:
    check = next(line for line in INSTRUCTIONS if line.startswith("HEALTHCHECK"))
    command = json.loads(check[check.index("CMD [") + 4 :])
    environ = {**os.environ, "MHR_PORT": "1"}
    done = subprocess.run([sys.executable, *command[1:]], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


def test_image_tag_is_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert _compose()["services"]["server"]["image"] == f"mhr-server:{version}"
