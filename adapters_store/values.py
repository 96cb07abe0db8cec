"""What values a record may hold, checked at the border: ids, texts, JSON, page sizes."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from adapters_store.errors import InvalidValue

JOB_ID = re.compile(r"job-[0-9a-f]{16}")
TASK_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
RESERVED_TASK_IDS = frozenset({"base", "mu"})
INVENTORY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_PAGE = 1000
MAX_KEY_LENGTH = 255
MAX_INTEGER = 2**31 - 1


def utc_now() -> datetime:
    """The present, timezone-aware."""
    return datetime.now(UTC)


def new_job_id() -> str:
    """`job-` and 16 hexadecimal digits."""
    return f"job-{secrets.token_hex(8)}"


def check_task_id(task_id: str) -> None:
    """Raise InvalidValue unless the id is well formed and not reserved."""
    if TASK_ID.fullmatch(task_id) is None:
        raise InvalidValue(
            "task_id",
            f"{task_id!r} is not a task id: use 1 to 128 of a-z, 0-9, '.', '_' and '-', "
            "beginning with a letter or digit.",
        )
    if task_id in RESERVED_TASK_IDS:
        raise InvalidValue("task_id", f"{task_id!r} is reserved; choose another task id.")


def check_inventory_name(name: str) -> None:
    """Raise InvalidValue unless the name is well formed."""
    if INVENTORY_NAME.fullmatch(name) is None:
        raise InvalidValue(
            "name",
            f"{name!r} is not an inventory name: use 1 to 128 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit.",
        )


def check_text(field: str, text: str | None) -> None:
    """Raise InvalidValue for a text that not every database can keep: NUL, or half of a surrogate pair."""
    if text is None:
        return
    if "\x00" in text:
        raise InvalidValue(field, f"{field} contains a NUL character; remove it.")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidValue(field, f"{field} is not valid Unicode at character {error.start}.") from None


def clean_text(text: str) -> str:
    """The text with other characters for what `check_text` refuses: for messages that no user can correct."""
    return text.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def check_key(field: str, text: str | None) -> None:
    """Raise InvalidValue for a short text that is empty or longer than MAX_KEY_LENGTH characters."""
    check_text(field, text)
    if text is not None and not 0 < len(text) <= MAX_KEY_LENGTH:
        raise InvalidValue(field, f"{field} has {len(text)} characters; use 1 to {MAX_KEY_LENGTH}.")


def check_limit(limit: int) -> None:
    """Raise InvalidValue unless 1 <= limit <= MAX_PAGE."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidValue("limit", f"limit is {limit}; use 1 to {MAX_PAGE}.")


def plain_json(field: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the object as it reads after storing: lists for tuples, None for NaN and infinities.

    Raises InvalidValue for what JSON cannot hold.
    """
    try:
        copy = json.loads(json.dumps(_finite(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValue(field, f"{field} cannot be kept as JSON: {error}.") from None
    if not isinstance(copy, dict):
        raise InvalidValue(field, f"{field} is not a JSON object.")
    return copy


def canonical_json(value: Mapping[str, Any]) -> str:
    """The same text for equal values."""
    return json.dumps(_finite(value), sort_keys=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
