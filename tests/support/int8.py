"""For tests of 8-bit weights: they skip on a processor that the server refuses to serve them on."""

from __future__ import annotations

import pytest
import torch

from server.engine.int8_linear import check_int8_works
from server.errors import InvalidInput
from server.native.library import load_library


def _refusal() -> str | None:
    """What a user would be told who asks for 8-bit weights here, or None where they are served."""
    try:
        check_int8_works(torch.device("cpu"), load_library())
    except InvalidInput as error:
        return str(error)
    return None


_REFUSAL = _refusal()
needs_int8 = pytest.mark.skipif(_REFUSAL is not None, reason=f"no 8-bit weights: {_REFUSAL}")
