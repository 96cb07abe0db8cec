"""How far one method is ahead of another, draw by draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from server.training.scores import Score


@dataclass(frozen=True)
class Lead:
    """Over the pairs of scores that two methods have for one task and seed, where both saw the same examples and
    answered the same instances. So what is hard or easy about a draw is in both and leaves the difference alone.
    """

    mean: float  # of the differences, in points
    standard_error: float | None  # of that mean, the pairs taken as independent; None of a single pair
    pairs: int
    tasks_ahead: int  # whose mean difference is above zero
    tasks: int

    @classmethod
    def of(cls, scores: Sequence[Score], others: Sequence[Score]) -> Lead | None:
        """Of one method's scores and another's at one number of examples; None when they have no pair."""
        theirs = {(score.task, score.seed): score.score for score in others}
        by_task: dict[str, list[float]] = {}
        for score in scores:
            if (score.task, score.seed) in theirs:
                by_task.setdefault(score.task, []).append(score.score - theirs[score.task, score.seed])
        differences = [difference for of_task in by_task.values() for difference in of_task]
        if not differences:
            return None
        return cls(
            mean=mean(differences),
            standard_error=stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
            pairs=len(differences),
            tasks_ahead=sum(mean(of_task) > 0 for of_task in by_task.values()),
            tasks=len(by_task),
        )

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.1f}"
        return f"{self.mean:+.1f}{error} ({self.tasks_ahead} of {self.tasks})"
