"""From decoded JSON to the dataclasses of `types`. Fields that this client does not know yet are ignored."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any, TypeVar

from mhr_client.errors import ProtocolError
from mhr_client.transport import load_json
from mhr_client.types import Page

T = TypeVar("T")


def parser(cls: type[T]) -> Callable[[bytes], T]:
    """A parser of answers that are one `cls`."""
    return lambda content: decode(cls, load_json(content))


def page_parser(cls: type[T]) -> Callable[[bytes], Page[T]]:
    """A parser of answers that are one page of a list of `cls`."""

    def parse(content: bytes) -> Page[T]:
        answer = load_json(content)
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise ProtocolError("the answer is not a list with `data`")
        return Page(tuple(decode(cls, item) for item in answer["data"]), answer.get("next_cursor"))

    return parse


def decode(cls: type[T], data: Any) -> T:
    """Build the dataclass `cls`. Raises ProtocolError naming the field that is missing or of another type."""
    if not isinstance(data, dict):
        raise ProtocolError(f"expected a JSON object for {cls.__name__}, got {type(data).__name__}")
    values = {}
    for name, (hint, required) in _fields(cls).items():  # type: ignore[arg-type]  # mypy takes no type[T] as hashable
        if name in data:
            values[name] = _convert(hint, data[name], f"{cls.__name__}.{name}")
        elif required:
            raise ProtocolError(f"the answer has no {cls.__name__}.{name}; is this an MHR server of this version?")
    return cls(**values)


@cache
def _fields(cls: type[Any]) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(cls)
    return {field.name: (hints[field.name], field.default is dataclasses.MISSING) for field in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        _expect(list, value, where)
        return tuple(_convert(typing.get_args(hint)[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return decode(hint, value)
    if hint is datetime:
        return _time(value, where)
    if origin is typing.Literal:
        hint, origin = str, None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _expect(origin or hint, value, where)
    return value


def _expect(kind: type, value: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise ProtocolError(f"{where} should be {kind.__name__}, got {type(value).__name__}")


def _time(value: Any, where: str) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"{where} should be a time, got {value!r}") from error
