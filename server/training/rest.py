"""Examples that an adaptation knows by heart sit out steps, so that its steps are spent on what it has yet to learn.

A few examples are learnt by heart long before the learning rates have fallen. From then on their gradients are next to
nothing and cost as much as any. Jiang et al. 2019 (arXiv 1910.00762) spend the backward pass on the sequences with the
largest losses alone; sitting out saves the forward pass too, and whatever is forgotten meanwhile is learnt again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.training.batches import EncodedExample

# docs/decisions/0017-known-examples-rest.md has both
_KNOWN = 0.003  # nats per answer token
_MOST_EPOCHS = 3


class Rest:
    """From which step on each example is trained on again.

    Steps and not epochs, so that of many examples, of which each is shown seldom, none is left out. But no more than
    three epochs, so that a few, which every step would show, are not left to the one that is hard.
    """

    def __init__(self, examples: Sequence[EncodedExample], steps: int, steps_per_epoch: int) -> None:
        """`steps`: how many of them an example sits out each time that it is found to be known; 0 for no rest."""
        self._steps = min(steps, _MOST_EPOCHS * steps_per_epoch)
        self._returns = dict.fromkeys(examples, 0)  # examples that are equal are one

    def is_over(self, example: EncodedExample, step: int) -> bool:
        """Whether the example is to be trained on where a step shows it."""
        return step >= self._returns[example]

    def note(self, examples: Iterable[EncodedExample], losses: Iterable[float], step: int) -> None:
        """Send those to rest whose loss in a step, in nats per answer token, shows that they are known."""
        for example, loss in zip(examples, losses, strict=True):
            if loss < _KNOWN:
                self._returns[example] = step + 1 + self._steps

    def state(self) -> list[int]:
        """From which `load` goes on, for the same examples in the same order."""
        return list(self._returns.values())

    def load(self, state: Iterable[int]) -> None:
        """Put back what `state` gave."""
        self._returns = dict(zip(self._returns, state, strict=True))
