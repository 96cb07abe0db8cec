"""Methods compared on tasks: every unit that is not yet scored is done, in this process or by several."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from server.errors import MHRError
from server.training.evaluation_plan import EvaluateConfig, Plan
from server.training.evaluator import Evaluator
from server.training.scores import Score, ScoreLog, Unit


def evaluate(
    config: EvaluateConfig,
    out: Path,
    num_workers: int = 1,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The scores of every unit of a configuration, in the order of `Plan.units`.

    Each is kept in the folder `out` as soon as it is there; a second call goes on from what it finds. `on_start`
    is told how many of all units are done. With several workers each is a process with a backbone of its own,
    started afresh, so a script that calls this needs `if __name__ == "__main__"`.

    Raises InvalidInput when the configuration cannot be run or `out` holds a run with other settings.
    """
    plan = Plan.read(config)
    units = plan.units()
    with ScoreLog.open(out, plan.settings()) as log:
        todo = [unit for unit in units if unit not in log.scores]
        on_start(len(units) - len(todo), len(units))
        scores = _in_processes(config, todo, num_workers) if num_workers > 1 and len(todo) > 1 else _here(plan, todo)
        for score in scores:
            log.append(score)
            on_score(score)
        return [log.scores[unit] for unit in units]


def _here(plan: Plan, units: Sequence[Unit]) -> Iterator[Score]:
    if units:
        evaluator = Evaluator(plan)
        yield from map(evaluator.score, units)


def _in_processes(config: EvaluateConfig, units: Sequence[Unit], num_workers: int) -> Iterator[Score]:
    """Scores in the order in which they are done."""
    pool = ProcessPoolExecutor(
        max_workers=min(num_workers, len(units)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(config, _threads(config, num_workers)),
    )
    try:
        for future in as_completed([pool.submit(_score, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool:
        raise MHRError(
            "a process of the evaluation died, most likely for want of memory; run the same command again with "
            "fewer workers, and it goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _threads(config: EvaluateConfig, num_workers: int) -> int:
    """Per process: its share of the cores, or one where a GPU computes."""
    on_cpu = torch.device(config.backbone.device).type == "cpu"
    return max(1, torch.get_num_threads() // num_workers) if on_cpu else 1


# A pool's workers get what they share once, at their start, and keep it for all their units.
_config: EvaluateConfig | None = None


def _begin_worker(config: EvaluateConfig, num_threads: int) -> None:
    global _config
    _config = config
    torch.set_num_threads(num_threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@functools.cache
def _evaluator() -> Evaluator:
    """This process's evaluator, made at its first unit, where an error reaches the caller as it is."""
    assert _config is not None
    return Evaluator(Plan.read(_config))


def _score(unit: Unit) -> Score:
    return _evaluator().score(unit)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers; they see it go."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
