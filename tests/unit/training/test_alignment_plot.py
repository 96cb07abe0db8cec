from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.alignment_plot import alignment_of, draw_alignment
from server.training.run_folder import RunFolder


def _run(path: Path, *alignments: float) -> Path:
    folder = RunFolder(path)
    folder.begin_log()
    for step, alignment in enumerate(alignments, 1):
        folder.log({"step": step * 10, "loss": 1.0, "seconds": 0.1})
        folder.log({"step": step * 10, "alignment": alignment})
    return path


def test_points_are_read_from_the_log_in_order(tmp_path: Path) -> None:
    assert alignment_of(_run(tmp_path / "mhr", 0.5, 0.25)) == [(10, 0.5), (20, 0.25)]


def test_draws_several_runs(tmp_path: Path) -> None:
    runs = [_run(tmp_path / "mhr", 0.5, 0.25), _run(tmp_path / "poly", 0.3, 0.2)]
    draw_alignment(runs, tmp_path / "alignment.svg")
    drawn = (tmp_path / "alignment.svg").read_text()
    assert "<!-- mhr -->" in drawn
    assert "<!-- poly -->" in drawn


def test_a_run_that_did_not_measure_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"plain measured no gradient alignment; train with --alignment-every N"):
        draw_alignment([_run(tmp_path / "plain")], tmp_path / "alignment.png")


def test_folders_of_one_name_cannot_be_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [_run(tmp_path / "a" / "mhr", 0.5), _run(tmp_path / "b" / "mhr", 0.5)]
    with pytest.raises(InvalidInput, match="folders of different names"):
        draw_alignment(runs, tmp_path / "alignment.png")
