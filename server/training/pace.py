"""How long a run still takes, by the steps just done."""

from __future__ import annotations

import time
from collections import deque

# Late steps of an adaptation are shorter, as examples come to rest, so the mean of all steps would promise too long a
# wait. Fewer than these would see a validation, and examples back from their rest, by chance only.
_STEPS = 20


class Pace:
    """Estimates the remaining time from the last steps that this process did."""

    def __init__(self) -> None:
        self._ends: deque[tuple[int, float]] = deque(maxlen=_STEPS + 1)  # a step, and when it was done

    def remaining_s(self, step: int, steps: int) -> float | None:
        """Seconds until all steps are done. To be asked after each; the first says None, as its length is not known."""
        self._ends.append((step, time.monotonic()))
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return round((ended - began) / (last - first) * (steps - last), 1) if last > first else None
