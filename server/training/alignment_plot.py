"""The gradient alignment of several pre-training runs, as lines over their steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from server.errors import InvalidInput
from server.plotting import figure_file
from server.training.run_folder import read_log


def draw_alignment(runs: Sequence[Path], out: Path) -> None:
    """One line a run, named by its folder. Raises InvalidInput for a run that did not measure it."""
    lines = {run.resolve().name: alignment_of(run) for run in runs}
    if len(lines) < len(runs):
        raise InvalidInput("lines are named by their folders; give folders of different names")
    with figure_file(out) as figure:
        axes = figure.subplots()
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name, marker=".")
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set(
            xlabel="step",
            ylabel="mean cosine between tasks' gradients",
            title="Gradient alignment on the skills in pre-training",
        )
        axes.legend()


def alignment_of(run: Path) -> list[tuple[int, float]]:
    """(step, alignment) in order, from a run's log. Raises InvalidInput when there is none."""
    points = [(record["step"], record["alignment"]) for record in read_log(run) if "alignment" in record]
    if not points:
        raise InvalidInput(f"the run in {run} measured no gradient alignment; train with --alignment-every N")
    return points
