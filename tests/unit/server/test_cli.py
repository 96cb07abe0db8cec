from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from adapters_store.store import Store
from server import __version__
from server.backbone import Backbone
from server.cli import app
from server.runtime import Runtime
from server.settings import Settings
from tests.support.tiny_server import LiveServer, import_tiny, random_inventory, write_tiny_model


@pytest.fixture
def mhr(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("MHR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MHR_BACKBONE", str(tiny_model))
    return CliRunner()


def run(mhr: CliRunner, *arguments: object, code: int = 0) -> Result:
    result = mhr.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def inventory_file(backbone: Backbone, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(random_inventory(backbone).to_bytes())
    return path


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "fastapi", "sqlalchemy")
    code = f"import sys, server.cli; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_version(mhr: CliRunner) -> None:
    assert run(mhr, "--version").output == f"mhr {__version__}\n"


def test_an_inventory_is_imported_listed_shown_and_verified(mhr: CliRunner, inventory_file: Path) -> None:
    assert "with 2 tasks" in run(mhr, "inventory", "import", inventory_file, "--name", "tiny").output
    [listed] = json.loads(run(mhr, "inventory", "list", "--json").output)
    assert (listed["name"], listed["num_heads"]) == ("tiny", 4)
    assert "tiny" in run(mhr, "inventory", "list").output
    shown = json.loads(run(mhr, "inventory", "show", "tiny", "--json").output)
    assert {name: shown[name] for name in listed} == listed
    assert json.loads(run(mhr, "inventory", "verify", "tiny", "--json").output)["tasks"] == ["capital", "rhyme"]


def test_an_inventory_shows_how_its_tasks_are_routed(mhr: CliRunner, inventory_file: Path, tmp_path: Path) -> None:
    run(mhr, "inventory", "import", inventory_file, "--name", "tiny")
    stored = json.loads(run(mhr, "inventory", "show", "tiny", "--json").output)
    of_file = json.loads(run(mhr, "inventory", "show", inventory_file, "--json").output)
    assert of_file | {"created_at": stored["created_at"]} == stored
    assert 0 < stored["routing"]["entropy_fraction"] < 1
    assert set(stored["routing"]["tasks"]) == {"capital", "rhyme"}
    picture = tmp_path / "routing.png"
    lines = run(mhr, "inventory", "show", inventory_file, "--plot", picture).output.splitlines()
    assert any(line.startswith("mean ") for line in lines)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_inventory_without_tasks_has_no_routing_to_draw(mhr: CliRunner, backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "bare.safetensors"
    path.write_bytes(replace(random_inventory(backbone), routings={}, tasks={}).to_bytes())
    assert json.loads(run(mhr, "inventory", "show", path, "--json").output)["routing"] is None
    assert "no routing to draw" in run(mhr, "inventory", "show", path, "--plot", tmp_path / "a.png", code=1).output
    assert "ends with none of these" in run(mhr, "inventory", "show", path, "--plot", tmp_path / "a.txt", code=1).output


def test_an_inventory_of_another_backbone_is_refused_with_both_fingerprints(
    mhr: CliRunner, inventory_file: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_model(tmp_path / "other", seed=8)
    monkeypatch.setenv("MHR_BACKBONE", str(tmp_path / "other"))
    refused = run(mhr, "inventory", "import", inventory_file, "--name", "tiny", code=1)
    assert backbone.fingerprint in refused.stderr
    assert refused.stderr.startswith("mhr: ")
    assert "Traceback" not in refused.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inventory", "show", "none"), "no inventory 'none'"),
        (("inventory", "verify", "none"), "no inventory 'none'"),
        (("tasks", "list", "--url", "http://127.0.0.1:9"), "Is the server running"),
        (("serve", "--port", "700000"), "MHR_PORT = 700000 is impossible"),
    ],
)
def test_errors_are_one_line_with_a_remedy(mhr: CliRunner, arguments: tuple[str, ...], words: str) -> None:
    refused = run(mhr, *arguments, code=1)
    assert words in refused.stderr.replace("'700000'", "700000")
    assert len(refused.stderr.splitlines()) == 1


def test_damage_is_named_and_ends_with_one(mhr: CliRunner, inventory_file: Path, tmp_path: Path) -> None:
    run(mhr, "inventory", "import", inventory_file, "--name", "tiny")
    assert "all sound" in run(mhr, "store", "verify").output
    with Store.open(tmp_path / "data") as store:
        digest = store.get_version("rhyme").blob_digest
        assert digest is not None
        path = store.blobs.path(digest)
    path.write_bytes(path.read_bytes()[:-3])
    damaged = run(mhr, "store", "verify", code=1)
    assert str(path) in damaged.stdout
    assert "rhyme@1" in damaged.stdout
    [found] = json.loads(run(mhr, "store", "verify", "--json", code=1).stdout)
    assert (found["digest"], found["problem"]) == (digest, "truncated")


def test_garbage_is_collected_and_backups_open(mhr: CliRunner, inventory_file: Path, tmp_path: Path) -> None:
    run(mhr, "inventory", "import", inventory_file, "--name", "tiny")
    with Store.open(tmp_path / "data") as store:
        store.blobs.put(b"orphan")
    assert json.loads(run(mhr, "store", "gc", "--json").output)["blobs"] == 0
    assert json.loads(run(mhr, "store", "gc", "--json", "--min-age-s", 0).output)["blobs"] == 1
    run(mhr, "store", "backup", tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copy:
        assert copy.get_task("capital").served_version == 1
        assert copy.verify() == []


def test_a_second_server_on_the_same_directory_is_refused(mhr: CliRunner, tiny_model: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(Settings(data_dir=tmp_path / "data", backbone=str(tiny_model), worker=False))
    try:
        refused = run(mhr, "serve", code=1)
        assert f"in use by process {os.getpid()}" in refused.stderr
    finally:
        runtime.close()


@pytest.fixture
def live(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    settings = Settings(data_dir=tmp_path / "data", backbone=str(tiny_model), worker=False, threads=1, inventory="tiny")
    server = LiveServer(settings, tasks=True)
    server.wait_ready()
    monkeypatch.setenv("MHR_URL", server.url)
    yield server
    server.stop()


@pytest.mark.usefixtures("live")
def test_commands_that_talk_to_a_server(mhr: CliRunner, tmp_path: Path) -> None:
    answer = json.loads(run(mhr, "generate", "--task", "capital", "--max-new-tokens", 3, "--json", "France").stdout)
    assert answer["usage"]["completion_tokens"] == 3
    text = answer["outputs"][0]["text"]
    streamed = run(mhr, "generate", "--task", "capital", "--max-new-tokens", 3, "--stream", "France").stdout
    assert streamed.removesuffix("\n") == text
    ranked = run(mhr, "generate", "--task", "capital", "--choice", "Paris", "--choice", "Rome", "France")
    assert ranked.stdout.strip() in ("Paris", "Rome")
    assert "Rome" in ranked.stderr
    assert "leave out --json" in run(mhr, "generate", "--task", "mu", "--stream", "--json", "x", code=1).stderr
    assert "no task 'nobody'" in run(mhr, "generate", "--task", "nobody", "x", code=1).stderr

    assert [task["id"] for task in json.loads(run(mhr, "tasks", "list", "--json").output)] == ["capital", "rhyme"]
    assert "capital" in run(mhr, "tasks", "list", "--prefix", "cap").output
    assert "routing" in run(mhr, "tasks", "show", "capital").output
    assert "serves version 1" in run(mhr, "tasks", "promote", "capital", 1).output

    out = tmp_path / "exported"
    run(mhr, "task", "export", "capital@1", "--out", out)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]

    run(mhr, "tasks", "delete", "rhyme")
    assert [task["id"] for task in json.loads(run(mhr, "tasks", "list", "--json").output)] == ["capital"]


@pytest.mark.usefixtures("live")
def test_jobs_from_the_command_line(mhr: CliRunner, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"input": "a", "output": "b"}\n\n{"input": "c", "output": ["d"]}\n')
    adapt = ("adapt", "--task", "new", "--examples", examples)
    job = json.loads(run(mhr, *adapt, "--method", "mhr-z", "--set", "steps=2", "--json").output)
    assert (job["status"], job["num_examples"]) == ("queued", 2)
    assert job["id"] in run(mhr, "jobs", "list").output
    shown = json.loads(run(mhr, "jobs", "show", job["id"], "--json").output)
    assert (shown["id"], shown["method"]) == (job["id"], "mhr-z")
    assert "is cancelled" in run(mhr, "jobs", "cancel", job["id"]).output
    assert "cancelled" in run(mhr, "jobs", "wait", job["id"], code=1).output
    examples.write_text("nonsense\n")
    assert "line 1 is not JSON" in run(mhr, *adapt, code=1).stderr
    examples.write_text('{"input": "a"}\n{"input": "a"}\n')
    assert "examples[0].output" in run(mhr, *adapt, code=1).stderr


def test_import_tiny_is_what_the_command_line_imports(mhr: CliRunner, tiny_model: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(Settings(data_dir=tmp_path / "data", backbone=str(tiny_model), worker=False))
    import_tiny(runtime)
    runtime.close()
    assert [item["name"] for item in json.loads(run(mhr, "inventory", "list", "--json").output)] == ["flat", "tiny"]
