"""Waves of requests and what they took; contenders in turns; ratios between them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from common import print_table

from serving.client import Answer
from serving.workload import Workload

RunWave = Callable[[Workload, int], "Wave"]


class Target(Protocol):
    """Something that answers waves: a server, an engine alone, a peer. Hashable: equal targets are started once."""

    def open(self, house: Any) -> RunWave:
        """Start it; the house ends it."""
        ...


@dataclass(frozen=True)
class Contender:
    """A target under one load, with the name that tables show."""

    name: str
    target: Target
    workload: Workload


@dataclass(frozen=True)
class Wave:
    """One wave's figures. Offline targets give seconds and tokens alone."""

    seconds: float
    tokens: int
    latency_s: tuple[float, ...] = ()
    first_token_s: tuple[float, ...] = ()
    gap_s: tuple[float, ...] = ()  # between the tokens of one stream

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Ratio:
    """`of` in units of `over`, as tokens per second; at_least is the target, if there is one."""

    of: Contender
    over: Contender
    at_least: float | None = None

    @property
    def name(self) -> str:
        return f"{self.of.name} / {self.over.name}"


def wave_of(answers: Sequence[Answer], prompt_tokens: int, new_tokens: int) -> Wave:
    """The figures of answers over HTTP. Raises SystemExit unless every one has exactly the asked tokens."""
    for answer in answers:
        usage = answer.body["usage"]
        found = usage["prompt_tokens"], usage["completion_tokens"]
        if found != (prompt_tokens, new_tokens):
            raise SystemExit(f"asked for {prompt_tokens} tokens in and {new_tokens} out, got {found}")
    timings = [answer.body.get("timing") or {} for answer in answers]
    streamed = [answer for answer in answers if answer.token_s]
    waited = [timing["ttft_ms"] / 1000 for timing in timings if timing.get("ttft_ms") is not None]
    return Wave(
        seconds=max(answer.done_s for answer in answers) - min(answer.sent_s for answer in answers),
        tokens=sum(answer.body["usage"]["completion_tokens"] for answer in answers),
        latency_s=tuple(answer.done_s - answer.sent_s for answer in answers),
        first_token_s=tuple(answer.token_s[0] - answer.sent_s for answer in streamed) or tuple(waited),
        gap_s=tuple(gap for answer in streamed for gap in gaps(answer.token_s)),
    )


def gaps(times: Sequence[float]) -> list[float]:
    """The differences of neighbours."""
    return [after - before for before, after in pairwise(times)]


def compare(house: Any, ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Run the ratios' contenders in turns, so that a drift of the machine meets all alike, and print two tables."""
    contenders = list(dict.fromkeys(c for ratio in ratios for c in (ratio.over, ratio.of)))
    runs = {contender: house.open(contender.target) for contender in contenders}
    waves: dict[Contender, list[Wave]] = {contender: [] for contender in contenders}
    for number in range(house.options.warmup + house.options.repeats):
        for contender, run in runs.items():
            wave = run(contender.workload, number)
            print(f"wave {number}: {contender.name} {wave.tokens_per_s:.1f} tok/s", file=sys.stderr)
            if number >= house.options.warmup:
                waves[contender].append(wave)
    figures = {contender.name: describe(found) for contender, found in waves.items()}
    print_table(
        f"{house.options.prompt_tokens} tokens in, {house.options.new_tokens} out, {house.options.repeats} waves each",
        ("contender", "tok/s", "spread", "p50 s", "p95 s", "first token p50 s", "p95 s", "gap p95 s"),
        [(name, *map(shown, figure.values())) for name, figure in figures.items()],
    )
    found = {}
    for ratio in ratios:
        found[ratio.name] = compare_waves(waves[ratio.of], waves[ratio.over]) | {"at_least": ratio.at_least}
    print_ratios(found)
    return {"contenders": figures, "ratios": found}


def compare_waves(of: Sequence[Wave], over: Sequence[Wave]) -> dict[str, Any]:
    return ratio_of([a.tokens_per_s for a in of], [b.tokens_per_s for b in over])


def ratio_of(of: Sequence[float], over: Sequence[float]) -> dict[str, Any]:
    """The median of ratios between runs that stood side by side, with the least and the largest."""
    ratios = [a / b for a, b in zip(of, over, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def print_ratios(ratios: dict[str, dict[str, Any]]) -> None:
    print_table(
        "Ratios, median of neighbouring runs",
        ("ratio", "median", "least", "most", "target"),
        [(name, r["median"], r["least"], r["most"], target_of(r)) for name, r in ratios.items()],
    )


def target_of(ratio: dict[str, Any]) -> str:
    """The target and whether it is met, in words."""
    if ratio.get("at_least") is not None:
        return f"at least {ratio['at_least']:g}: {'met' if ratio['median'] >= ratio['at_least'] else 'not met'}"
    if ratio.get("at_most") is not None:
        return f"at most {ratio['at_most']:g}: {'met' if ratio['median'] <= ratio['at_most'] else 'not met'}"
    return ""


def describe(waves: Sequence[Wave]) -> dict[str, float | None]:
    """Medians over waves; percentiles are taken within each."""
    speeds = [wave.tokens_per_s for wave in waves]

    def median(of: Callable[[Wave], tuple[float, ...]], percent: int) -> float | None:
        found = [percentile(of(wave), percent) for wave in waves if of(wave)]
        return statistics.median(found) if found else None

    return {
        "tokens_per_s": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "latency_p50_s": median(lambda wave: wave.latency_s, 50),
        "latency_p95_s": median(lambda wave: wave.latency_s, 95),
        "first_token_p50_s": median(lambda wave: wave.first_token_s, 50),
        "first_token_p95_s": median(lambda wave: wave.first_token_s, 95),
        "gap_p95_s": median(lambda wave: wave.gap_s, 95),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def shown(value: float | None) -> float | str:
    return "" if value is None else value
