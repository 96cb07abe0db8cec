"""The library of compiled operators (docs/decisions/0012-compiled-operators.md).

It is built when the package is installed and may be missing: torch computes the same then.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

_LIBRARY = "server.native._operators"
INSTRUCTIONS = ("avx512", "avx2", "plain")  # the widest first

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "mhr_add_rows": [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _INT],
    "mhr_attend": [*[_POINTER] * 6, _SIZE, _FLOAT, _POINTER, _POINTER, _INT],
    "mhr_quantise_rows": [_POINTER, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3, _INT],
    "mhr_join_rows": [*[_POINTER] * 3, _SIZE, _SIZE, _POINTER, _INT],
    "mhr_int8_rows": [*[_POINTER] * 3, _SIZE, *[_POINTER] * 4, _INT],
    "mhr_mix_rows": [*[_POINTER] * 3, _SIZE, _POINTER, _SIZE, _POINTER, _INT],
    "mhr_norm_rows": [*[_POINTER] * 4, _FLOAT, _SIZE, _SIZE, _POINTER, _INT],
    "mhr_rotate_rows": [_POINTER, _POINTER, _SIZE, _POINTER, _POINTER, *[_SIZE] * 3, _INT],
    "mhr_gate_rows": [_POINTER, _POINTER, _SIZE, _SIZE, _POINTER, _INT],
}

_NUMBERS_FOR_THREADS = 16_384  # of fewer, one thread is done before others have begun


def threads_for(numbers: int) -> int:
    """The threads that share out an operator's work on so many numbers."""
    return torch.get_num_threads() if numbers >= _NUMBERS_FOR_THREADS else 1


class Library:
    """The operators on one of `INSTRUCTIONS`, or on the first one that the processor has.

    Raises OSError where they were not built or the processor lacks the instructions.
    """

    def __init__(self, instructions: str | None = None) -> None:
        spec = importlib.util.find_spec(_LIBRARY)
        if spec is None or spec.origin is None:
            raise OSError("they were not built")
        # Calls keep Python's lock: each takes some microseconds, and asking for the lock back may take milliseconds.
        self._library = ctypes.PyDLL(spec.origin)
        find = self._library.mhr_find_kernels
        find.argtypes, find.restype = [ctypes.c_char_p], _POINTER
        kernels = {name: find(name.encode()) for name in INSTRUCTIONS if instructions in (None, name)}
        found = [name for name, pointer in kernels.items() if pointer]
        if not found:
            raise OSError(f"this processor has no {instructions}")
        self.instructions = found[0]
        self.kernels: int = kernels[found[0]]  # the first argument of every operator
        # Matrix tiles, for 8-bit and bf16 numbers
        self.has_tiles = self.instructions == "avx512" and bool(self._library.mhr_has_tiles())

    def operator(self, name: str) -> Any:
        """The C function of this name, with the types of its arguments."""
        function = self._library[name]
        function.argtypes, function.restype = _ARGUMENTS[name], None
        return function


@cache
def load_library() -> Library | None:
    """The library; None, with one line in the log, where there is none."""
    try:
        library = Library()
    except OSError as error:
        logger.warning(
            "torch computes what the compiled operators would, which is slower, since they cannot be used (%s); "
            "install a C++ compiler with OpenMP and install the server again",
            error,
        )
        return None
    logger.info("the compiled operators are in use (%s)", library.instructions)
    return library
