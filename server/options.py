"""The parameters of one generation: the task's defaults under the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from server.engine.request import SamplingParams
from server.errors import InvalidInput


@dataclass(frozen=True)
class GenerationOptions:
    """Parameters beside those of sampling."""

    n: int = 1
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None


def merge_options(
    defaults: Mapping[str, Any], given: Mapping[str, Any], place: str = "parameters"
) -> tuple[SamplingParams, GenerationOptions]:
    """The task's defaults under the caller's parameters; each holds only what was set.

    Raises InvalidInput naming `<place>.<field>` when they do not go together.
    """
    if given.get("choices") is not None:
        return SamplingParams(), GenerationOptions(choices=tuple(given["choices"]))
    merged = {**defaults, **given}
    # A default must not make the caller's own smaller limit impossible.
    if "max_new_tokens" in given and "min_new_tokens" not in given and "min_new_tokens" in merged:
        merged["min_new_tokens"] = min(merged["min_new_tokens"], merged["max_new_tokens"])
    try:
        sampling = SamplingParams(**{f.name: merged[f.name] for f in fields(SamplingParams) if f.name in merged})
    except InvalidInput as error:
        raise InvalidInput(error.message, param=f"{place}.{error.param}") from None
    return sampling, GenerationOptions(n=merged.get("n", 1), stop=tuple(merged.get("stop", ())))
