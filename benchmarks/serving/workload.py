"""What is asked of a contender in one wave: how many requests, of which tasks, when, with which prompts."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from transformers import PreTrainedTokenizerBase

Popularity = Literal["each", "uniform", "zipf"]
WORDS = ("the", "old", "lamp", "broke", "after", "two", "days", "and", "my", "order", "never", "came", "please", "pay")


@dataclass(frozen=True)
class Workload:
    """One wave. `tasks` = 0 asks the bare backbone; `each` gives request i the task i modulo `tasks`."""

    clients: int = 32  # in a closed loop; with a rate, nobody waits for an answer before the next request
    per_client: int = 1
    tasks: int = 0
    popularity: Popularity = "each"
    rate_per_s: float | None = None  # Poisson arrivals
    stream: bool = False

    @property
    def requests(self) -> int:
        return self.clients * self.per_client

    def draw_tasks(self, wave: int) -> list[int | None]:
        """The task of every request; another wave draws others."""
        if not self.tasks:
            return [None] * self.requests
        if self.popularity == "each":
            return [number % self.tasks for number in range(self.requests)]
        weights = [1.0 if self.popularity == "uniform" else 1 / (rank + 1) for rank in range(self.tasks)]
        return list(random.Random(wave).choices(range(self.tasks), weights, k=self.requests))

    def draw_arrivals(self, wave: int) -> list[float | None]:
        """Seconds from the wave's start, of an open loop."""
        if self.rate_per_s is None:
            return [None] * self.requests
        draw = random.Random(wave)
        return list(accumulate(draw.expovariate(self.rate_per_s) for _ in range(self.requests)))


@dataclass(frozen=True)
class Prompt:
    """A text with exactly these tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class PromptMaker:
    """Prompts of random words, none of which begins like another."""

    tokenizer: PreTrainedTokenizerBase
    draw: random.Random = field(default_factory=lambda: random.Random(zlib.crc32(b"prompts")))

    def make(self, count: int, tokens: int) -> list[Prompt]:
        return [self._one(tokens) for _ in range(count)]

    def _one(self, tokens: int) -> Prompt:
        for _ in range(1000):
            words = f"{self.draw.randrange(10**9)} {' '.join(self.draw.choices(WORDS, k=tokens))}"
            text = self._decode(self._encode(words)[:tokens])
            token_ids = self._encode(text)
            if len(token_ids) == tokens:
                return Prompt(text, tuple(token_ids))
        raise SystemExit(f"found no text of exactly {tokens} tokens")

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
