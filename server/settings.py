"""Every setting: read once from the environment (`MHR_*`) and an optional TOML file into one frozen object."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from server.environment import CLIENT_KEY, CLIENT_URL, CONFIG_FILE, PREFIX, TEST_PREFIX
from server.errors import InvalidInput

# Names that begin like ours and are not settings.
_OTHER_NAMES = frozenset({CONFIG_FILE, CLIENT_URL, CLIENT_KEY})


class Settings(BaseSettings):
    """The server's settings. A field `name` is `MHR_NAME` in the environment and `name` in the file.

    The environment wins over the file. Build it with `load_settings`, which also refuses unknown names.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", validate_default=True
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    data_dir: Path = Field(default=Path("data"), description="Catalog, blobs, checkpoints and prepared backbones")
    database_url: SecretStr | None = Field(
        default=None,
        description="Catalog database, e.g. postgresql+psycopg://user:password@host/name; SQLite in data_dir if unset",
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="File with one `name:key` a line; when set, every call needs `Authorization: Bearer <key>`",
    )
    backbone: str = Field(
        default="SmolLM2-135M-Instruct",
        min_length=1,
        description="The bundled backbone, a model directory or a Hugging Face id",
    )
    inventory: str | None = Field(
        default=None, description="Inventory that `mu` and new tasks use; the bundled or the only fitting one if unset"
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:<number>")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Number format of the model"
    )
    quantization: Literal["none", "int8"] = Field(
        default="none", description="int8 keeps the model's weights in 8 bits: faster and smaller, a little less exact"
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of the model; all cores if unset")
    worker_threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of the adaptation worker; all cores if unset"
    )
    max_batch: int = Field(default=32, ge=1, le=4096, description="Sequences computed together in one step")
    max_context: int = Field(
        default=2048, ge=16, description="Tokens of a prompt and its answer; at most the backbone's context"
    )
    max_queue: int = Field(default=1024, ge=1, description="Sequences that may wait; more are refused with 503")
    prefill_chunk: int = Field(
        default=256, ge=1, description="Prompt tokens computed in one step at most; fewer while others decode"
    )
    prefix_cache_mb: int = Field(
        default=512, ge=0, description="Budget of computed prompt prefixes in memory, in MiB; 0 keeps none"
    )
    adapter_cache_mb: int = Field(default=512, ge=0, description="Budget of assembled adapters in memory, in MiB")
    merged_tasks: int | None = Field(
        default=None,
        ge=0,
        description="Tasks with a copy of the weights that their adapter is merged into, used while a task has the "
        "batch to itself; if unset, one where a copy takes at most 1 GiB and the weights are not int8",
    )
    max_inputs: int = Field(default=256, ge=1, description="Inputs in one /generate call")
    max_examples: int = Field(default=1000, ge=2, description="Examples in one /adapt call, validation included")
    max_body_mb: int = Field(default=16, ge=1, description="Largest request body, in MiB")
    request_timeout_s: float = Field(default=300.0, gt=0, description="A longer /generate call ends with 504")
    drain_timeout_s: float = Field(default=30.0, ge=0, description="How long a stopping server finishes its requests")
    worker: bool = Field(default=True, description="Start the adaptation worker beside the server")
    metrics_tasks: int = Field(
        default=50, ge=1, description="Tasks with a label of their own in /metrics; the rest are `other`"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level logged")

    @field_validator("quantization")
    @classmethod
    def _quantization_fits_the_device(cls, value: str, others: ValidationInfo) -> str:
        if value == "int8" and others.data.get("device", "cpu") != "cpu":
            raise ValueError("int8 is computed on the CPU only; leave it at none or set MHR_DEVICE=cpu")
        return value

    @field_validator("merged_tasks")
    @classmethod
    def _merged_weights_are_not_quantised(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value and others.data.get("quantization") == "int8":
            raise ValueError("int8 weights are not merged; set it to 0 or leave it unset")
        return value

    @field_validator("database_url")
    @classmethod
    def _database_is_known(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        try:
            backend = make_url(value.get_secret_value()).get_backend_name()
        except ArgumentError:
            raise ValueError(
                "it is not a database URL; it should look like postgresql+psycopg://user@host/name"
            ) from None
        if backend not in ("sqlite", "postgresql"):
            raise ValueError(f"the database {backend!r} is not supported; use sqlite or postgresql")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line over environment over file."""
        path = os.environ.get(CONFIG_FILE)
        file = (TomlConfigSettingsSource(settings_cls, Path(path)),) if path else ()
        return init_settings, env_settings, *file

    def public(self) -> dict[str, Any]:
        """All settings as plain values, secrets masked."""
        values = self.model_dump(mode="json")
        if self.database_url is not None:
            values["database_url"] = make_url(self.database_url.get_secret_value()).render_as_string(hide_password=True)
        return values

    def environ(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """An environment in which a child process reads exactly these settings."""
        others = {k: v for k, v in inherited.items() if not k.startswith(PREFIX) or k.startswith(TEST_PREFIX)}
        values = self.model_dump(exclude_none=True) | {"database_url": self.database()}
        return others | {env_name(field): str(value) for field, value in values.items() if value is not None}

    def database(self) -> str | None:
        """The catalog's database URL with its password, or None for SQLite in the data directory."""
        return None if self.database_url is None else self.database_url.get_secret_value()


def env_name(field: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + field.upper()


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; `overrides` (command line options, None for unset) win over all else.

    Raises InvalidInput with one sentence per problem when a name is unknown or a value impossible.
    """
    known = {env_name(field) for field in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX) and name not in known | _OTHER_NAMES:
            raise InvalidInput(
                f"{name} is not a setting; unset it or correct its name{_suggestion(name, known)}", param=name
            )
    path = os.environ.get(CONFIG_FILE)
    if path and not Path(path).is_file():
        raise InvalidInput(f"{CONFIG_FILE} names {path}, which is no file", param=CONFIG_FILE)
    try:
        return Settings(**{field: value for field, value in overrides.items() if value is not None})
    except ValidationError as error:
        raise InvalidInput("; ".join(_sentence(problem) for problem in error.errors())) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"{CONFIG_FILE} {path} cannot be read: {error}", param=CONFIG_FILE) from error


def load_api_keys(path: Path) -> dict[str, str]:
    """{key: name} of a file with one `name:key` a line; blank lines and lines that begin with # are skipped.

    Raises InvalidInput naming the line, or when there is no key at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"MHR_API_KEYS_FILE {path} cannot be read: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (name and colon and key):
            raise InvalidInput(f"MHR_API_KEYS_FILE {path}, line {number}: write one key as `name:key`")
        if key in keys:
            raise InvalidInput(f"MHR_API_KEYS_FILE {path}, line {number}: the key of {keys[key]!r} occurs again")
        keys[key] = name
    if not keys:
        raise InvalidInput(f"MHR_API_KEYS_FILE {path} holds no key; add one as `name:key`, or unset MHR_API_KEYS_FILE")
    return keys


def _sentence(problem: Any) -> str:
    """One pydantic problem as a sentence for the operator; the value of a secret is never shown."""
    field = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        hint = _suggestion(field, set(Settings.model_fields))
        return f"{field!r} in the file of {CONFIG_FILE} is not a setting; remove it or correct its name{hint}"
    reason = problem["msg"].removeprefix("Value error, ")
    shown = "" if field == "database_url" else f" = {str(problem['input'])!r}"
    described = Settings.model_fields[field].description if field in Settings.model_fields else None
    return f"{env_name(field)}{shown} is impossible: {reason}" + (f" ({described})" if described else "")


def _suggestion(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
