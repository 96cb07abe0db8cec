"""Our file format: one safetensors file, with a JSON document under the metadata key `mhr`. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from server.errors import InvalidInput

_KEY = "mhr"


def write_document(form: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A file's bytes; `form` names what the document describes, e.g. `mhr-routing-1`."""
    metadata = {_KEY: json.dumps({"format": form, **document})}
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)


def read_document(form: str, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors) of a file made by `write_document`. Raises InvalidInput when it is not of that form."""
    try:
        length = int.from_bytes(data[:8], "little")
        document = dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY]))
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"not a file of the form {form!r}: expected safetensors with an {_KEY!r} document"
        ) from error
    if document.get("format") != form:
        raise InvalidInput(f"the file is of the form {document.get('format')!r}, expected {form!r}")
    return document, tensors
