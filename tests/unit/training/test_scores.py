from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from server.errors import Conflict, InvalidInput
from server.training.scores import RunSettings, Score, ScoreLog, Unit, read_scores

SETTINGS = RunSettings({"instances": 10}, {"a": "digest"}, {"mhr, 8 examples": {"hyperparameters": {"steps": 5}}})


def _score(task: str = "a", seed: int = 0, score: float = 50.0) -> Score:
    return Score(task, "mhr", seed, 8, "rouge_l", score, 10.0, 10, 0.0, {"seconds": 1.5}, "cpu")


def test_scores_are_kept_line_by_line_and_read_back(tmp_path: Path) -> None:
    with ScoreLog.open(tmp_path / "new" / "run", SETTINGS) as log:
        log.append(_score())
        assert len((tmp_path / "new" / "run" / "scores.jsonl").read_text().splitlines()) == 1
        log.append(_score(seed=1))
    with ScoreLog.open(tmp_path / "new" / "run", SETTINGS) as log:
        assert log.scores == {Unit("a", 0, 8, "mhr"): _score(), Unit("a", 1, 8, "mhr"): _score(seed=1)}


def test_a_line_that_a_killed_process_left_unfinished_is_done_again(tmp_path: Path) -> None:
    with ScoreLog.open(tmp_path, SETTINGS) as log:
        log.append(_score())
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write('{"task": "a", "met')
    with ScoreLog.open(tmp_path, SETTINGS) as log:
        assert list(log.scores.values()) == [_score()]
        log.append(_score(seed=1))
    assert len(read_scores([tmp_path])[1]) == 2


def test_a_run_grows_by_tasks_and_columns(tmp_path: Path) -> None:
    with ScoreLog.open(tmp_path, SETTINGS):
        pass
    grown = RunSettings(SETTINGS.protocol, {"b": "other"}, {"mu": {}})
    with ScoreLog.open(tmp_path, grown):
        pass
    assert set(json.loads((tmp_path / "settings.json").read_text())["tasks"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (replace(SETTINGS, protocol={"instances": 20}), "protocol, instances: 10, now 20"),
        (replace(SETTINGS, tasks={"a": "changed"}), "tasks, a: 'digest', now 'changed'"),
        (
            replace(SETTINGS, columns={"mhr, 8 examples": {"hyperparameters": {"steps": 9}}}),
            "columns, mhr, 8 examples: hyperparameters {'steps': 5}, now {'steps': 9}",
        ),
        (replace(SETTINGS, protocol={"instances": 10, "new": 1}), "another version"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, settings: RunSettings, reason: str) -> None:
    with ScoreLog.open(tmp_path, SETTINGS):
        pass
    with pytest.raises(InvalidInput, match=reason), ScoreLog.open(tmp_path, settings):
        pass


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    with (
        ScoreLog.open(tmp_path, SETTINGS),
        pytest.raises(Conflict, match="another process"),
        ScoreLog.open(tmp_path, SETTINGS),
    ):
        pass


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with ScoreLog.open(tmp_path, SETTINGS) as log:
        log.append(_score())
    with (tmp_path / "scores.jsonl").open("a") as file:
        file.write("[]\n")
    with pytest.raises(InvalidInput, match=r"scores.jsonl, row 2 is no score"), ScoreLog.open(tmp_path, SETTINGS):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InvalidInput, match=r"cannot be written to .*file/run"),
        ScoreLog.open(tmp_path / "file" / "run", SETTINGS),
    ):
        pass


def test_runs_of_several_folders_are_one(tmp_path: Path) -> None:
    for name, scores in {"x": [_score(), _score(seed=1)], "y": [_score(seed=1, score=60.0), _score(seed=2)]}.items():
        with ScoreLog.open(tmp_path / name, SETTINGS) as log:
            for score in scores:
                log.append(score)
    _, merged = read_scores([tmp_path / "x", tmp_path / "y"])
    assert {score.seed: score.score for score in merged} == {0: 50.0, 1: 50.0, 2: 50.0}


def test_folders_that_disagree_are_not_merged(tmp_path: Path) -> None:
    for name, settings in {"x": SETTINGS, "y": replace(SETTINGS, protocol={"instances": 20})}.items():
        with ScoreLog.open(tmp_path / name, settings) as log:
            log.append(_score())
    with pytest.raises(InvalidInput, match="y was made with other settings: protocol, instances"):
        read_scores([tmp_path / "x", tmp_path / "y"])


def test_a_folder_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="holds no scores"):
        read_scores([tmp_path])
    with ScoreLog.open(tmp_path, SETTINGS):
        pass
    with pytest.raises(InvalidInput, match="no scores yet"):
        read_scores([tmp_path])
