"""Examples that an adaptation knows by heart sit out turns, so that its steps are spent on what it has yet to learn.

A few examples are learnt by heart long before the learning rates have fallen. From then on their gradients are next to
nothing and cost as much as any. Jiang et al. 2019 (arXiv 1910.00762) spend the backward pass on the sequences with the
largest losses alone; a turn left out saves the forward pass too, and whatever is forgotten meanwhile is learnt again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.training.batches import EncodedExample

_KNOWN = 0.003  # nats per answer token; docs/decisions/0017-known-examples-rest.md


class Rest:
    """When each example is trained on again. A turn is an epoch: in each the example would be shown once."""

    def __init__(self, examples: Sequence[EncodedExample], turns: int) -> None:
        """`turns`: how many of them an example sits out each time that it is found to be known; 0 for no rest."""
        self._turns = turns
        self._returns = dict.fromkeys(examples, 0)  # epoch; examples that are equal are one

    def is_over(self, example: EncodedExample, epoch: int) -> bool:
        """Whether the example is to be trained on in an epoch."""
        return epoch >= self._returns[example]

    def note(self, examples: Iterable[EncodedExample], losses: Iterable[float], epoch: int) -> None:
        """Send those to rest whose loss, in nats per answer token, shows that they are known."""
        for example, loss in zip(examples, losses, strict=True):
            if loss < _KNOWN:
                self._returns[example] = epoch + 1 + self._turns

    def state(self) -> list[int]:
        """From which `load` goes on, for the same examples in the same order."""
        return list(self._returns.values())

    def load(self, state: Iterable[int]) -> None:
        """Put back what `state` gave."""
        self._returns = dict(zip(self._returns, state, strict=True))
