"""How well held-out answers are predicted: what chooses a state of an adaptation, and which version is served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_FEWEST_ERRORS = 0.02  # variance p (1 - p) of an accuracy that a few examples show as perfect


@dataclass(frozen=True)
class Validation:
    """Of one held-out example, or the mean over several.

    `accuracy` is the share of an answer's tokens, its end included, that the model would choose after the tokens
    before them; `loss` is in nats per token.
    """

    accuracy: float
    loss: float

    @classmethod
    def mean(cls, of_each: Sequence[Validation]) -> Validation:
        """Over at least one example, each counting alike."""
        accuracy = sum(one.accuracy for one in of_each) / len(of_each)
        loss = sum(one.loss for one in of_each) / len(of_each)
        return cls(round(accuracy, 5), round(loss, 5))

    def better_than(self, other: Validation) -> bool:
        """More accurate, or as accurate with less loss.

        Loss alone would stop too soon: a few examples make a model sure of itself, right or wrong, so that the
        loss on others rises while more and more of their answers come out right.
        """
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


def chance(accuracy: float, examples: int) -> float:
    """One standard error of an accuracy seen on so many examples: less of a difference says nothing.

    Source: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3 (the 1 SE rule).
    """
    return math.sqrt(max(accuracy * (1.0 - accuracy), _FEWEST_ERRORS) / examples)
