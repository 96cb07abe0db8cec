from __future__ import annotations

from pathlib import Path

import pytest

from server.backbone import BUNDLED_BACKBONE
from server.environment import CLIENT_KEY, CLIENT_URL
from server.errors import InvalidInput
from server.settings import Settings, env_name, load_api_keys, load_settings


def test_defaults_start_offline_on_this_machine_alone() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.backbone) == ("127.0.0.1", 8000, BUNDLED_BACKBONE)
    assert settings.api_keys_file is None


def test_command_line_over_environment_over_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "mhr.toml"
    file.write_text('port = 1\nmax_batch = 2\nhost = "0.0.0.0"\n')
    monkeypatch.setenv("MHR_CONFIG_FILE", str(file))
    monkeypatch.setenv("MHR_PORT", "3")
    monkeypatch.setenv("MHR_MAX_BATCH", "4")
    settings = load_settings(port=5, max_batch=None)
    assert (settings.host, settings.port, settings.max_batch) == ("0.0.0.0", 5, 4)


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHR_THREADS", "")
    assert load_settings().threads is None


@pytest.mark.parametrize("name", ["MHR_TEST_DATA", CLIENT_URL, CLIENT_KEY])
def test_names_that_are_not_the_servers_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    load_settings()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MHR_PROT", "8000", ["MHR_PROT is not a setting", "did you mean MHR_PORT?"]),
        ("MHR_MERGED_TASKS", "-1", ["MHR_MERGED_TASKS", "greater than or equal to 0"]),
        ("MHR_PORT", "eighty", ["MHR_PORT = 'eighty' is impossible", "integer"]),
        ("MHR_PORT", "70000", ["MHR_PORT = '70000'", "65535"]),
        ("MHR_MAX_BATCH", "0", ["MHR_MAX_BATCH", "greater than or equal to 1"]),
        ("MHR_QUANTIZATION", "int4", ["MHR_QUANTIZATION", "'none' or 'int8'"]),
        ("MHR_DTYPE", "fp8", ["MHR_DTYPE", "'float32', 'bfloat16' or 'float16'"]),
        ("MHR_DEVICE", "gpu", ["MHR_DEVICE", "cpu, cuda or cuda:<number>"]),
        ("MHR_DATABASE_URL", "mysql://u:secret@h/d", ["MHR_DATABASE_URL is impossible", "sqlite or postgresql"]),
        ("MHR_DATABASE_URL", "nonsense:secret", ["MHR_DATABASE_URL is impossible"]),
        ("MHR_CONFIG_FILE", "/no/such/file.toml", ["MHR_CONFIG_FILE names /no/such/file.toml"]),
    ],
)
def test_what_cannot_be_stops_the_start_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInput) as caught:
        load_settings()
    for word in words:
        assert word in caught.value.message
    assert "secret" not in caught.value.message


def test_merged_copies_of_int8_weights_stop_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHR_QUANTIZATION", "int8")
    monkeypatch.setenv("MHR_MERGED_TASKS", "0")
    assert load_settings().merged_tasks == 0
    monkeypatch.setenv("MHR_MERGED_TASKS", "2")
    with pytest.raises(InvalidInput, match="MHR_MERGED_TASKS = '2' is impossible: int8 weights are not merged"):
        load_settings()


def test_int8_on_a_gpu_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHR_QUANTIZATION", "int8")
    assert load_settings().quantization == "int8"
    monkeypatch.setenv("MHR_DEVICE", "cuda:1")
    with pytest.raises(InvalidInput, match="MHR_QUANTIZATION = 'int8' is impossible: int8 is computed on the CPU only"):
        load_settings()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot = 1", ["'prot'", "did you mean port?"]),
        ("port = ", ["cannot be read"]),
        ('port = "x"', ["MHR_PORT = 'x' is impossible"]),
    ],
)
def test_a_bad_file_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, words: list[str]
) -> None:
    file = tmp_path / "mhr.toml"
    file.write_text(content)
    monkeypatch.setenv("MHR_CONFIG_FILE", str(file))
    with pytest.raises(InvalidInput) as caught:
        load_settings()
    for word in words:
        assert word in caught.value.message


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHR_PORT", "x")
    monkeypatch.setenv("MHR_MAX_QUEUE", "y")
    with pytest.raises(InvalidInput, match=r"MHR_PORT.*MHR_MAX_QUEUE"):
        load_settings()


def test_a_child_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "postgresql+psycopg://user:secret@host/name"
    settings = load_settings(port=1234, data_dir=tmp_path, database_url=url, worker=False, request_timeout_s=1.5)
    environ = settings.environ({"PATH": "/bin", "MHR_PORT": "1", "MHR_CONFIG_FILE": "f", "MHR_TEST_DATA": "d"})
    assert (environ["PATH"], environ["MHR_TEST_DATA"]) == ("/bin", "d")
    assert "MHR_CONFIG_FILE" not in environ
    for name, value in environ.items():
        if name.startswith("MHR_") and name != "MHR_TEST_DATA":
            monkeypatch.setenv(name, value)
    assert load_settings() == settings


def test_secrets_are_not_shown() -> None:
    settings = Settings(database_url="postgresql+psycopg://user:secret@host/name")  # type: ignore[arg-type]
    assert "secret" not in repr(settings)
    assert settings.public()["database_url"] == "postgresql+psycopg://user:***@host/name"
    assert settings.database() == "postgresql+psycopg://user:secret@host/name"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(Exception, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    assert env_name("max_batch") == "MHR_MAX_BATCH"


def test_keys_are_read_by_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nalice: a1:with:colons \nbob:b2\n")
    assert load_api_keys(file) == {"a1:with:colons": "alice", "b2": "bob"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("alice\n", "line 1: write one key as `name:key`"),
        ("alice:\n", "line 1"),
        ("a:k\nb:k\n", "line 2: the key of 'a' occurs again"),
        ("# none\n", "holds no key"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidInput, match=words):
        load_api_keys(file)
