"""The library on each instruction set of this processor, to run a test on all of them; none where it was not built."""

from __future__ import annotations

from server.native import library
from server.native.library import Library


def _libraries() -> list[Library]:
    found = []
    for name in library.INSTRUCTIONS:
        try:
            found.append(Library(name))
        except OSError:
            continue
    return found


LIBRARIES = _libraries()
INSTRUCTIONS = [found.instructions for found in LIBRARIES]
