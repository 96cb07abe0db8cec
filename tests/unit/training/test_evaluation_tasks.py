from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.training.evaluation_tasks import EvaluationTask, draw, read_evaluation_tasks
from server.training.examples import Example


def _examples(count: int, prefix: str = "") -> tuple[Example, ...]:
    return tuple(Example(f"{prefix}{i}", ("a",)) for i in range(count))


def _write_set(folder: Path, *parts: str, rows: int = 6) -> None:
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["a", "b"]')
    for part in parts:
        sentences = [{"sentence": f"{part} {i}", "label": "ab"[i % 2]} for i in range(rows)]
        (folder / f"{part}.json").write_text(json.dumps(sentences))


def test_no_example_is_among_the_instances_also_where_an_input_occurs_twice() -> None:
    task = EvaluationTask("t", "", _examples(40) + _examples(40))
    drawn = draw(task, [8, 24], 16, seed=3)[24]
    inputs = [example.input for example in (*drawn.examples, *drawn.instances)]
    assert len(inputs) == len(set(inputs)) == 40


def test_all_numbers_of_examples_share_the_instances_and_fewer_are_the_first_of_more() -> None:
    drawn = draw(EvaluationTask("t", "", _examples(40)), [4, 12], 10, seed=0)
    assert drawn[0].instances == drawn[4].instances == drawn[12].instances
    assert drawn[12].examples[:4] == drawn[4].examples
    assert drawn[0].examples == ()


def test_seeds_draw_differently_and_the_same_seed_alike() -> None:
    task = EvaluationTask("t", "", _examples(40))
    assert draw(task, [4], 10, seed=1) == draw(task, [4], 10, seed=1) != draw(task, [4], 10, seed=2)


def test_too_few_instances_are_named() -> None:
    with pytest.raises(InvalidInput, match="'t' has 16 instances; 24 examples and 100 others"):
        draw(EvaluationTask("t", "", _examples(16)), [24], 100, seed=0)


def test_a_set_with_a_part_of_its_own_to_answer_is_learnt_from_the_other() -> None:
    task = EvaluationTask("t", "", _examples(10) + _examples(3, "test "), _examples(5, "test "), ("a", "b"))
    drawn = draw(task, [8], 100, seed=0)[8]
    assert {instance.input for instance in drawn.instances} == {f"test {i}" for i in range(5)}
    assert not any(example.input.startswith("test") for example in drawn.examples)


def test_a_set_without_is_cut() -> None:
    drawn = draw(EvaluationTask("t", "", _examples(10), None, ("a", "b")), [8], 100, seed=0)[8]
    assert len(drawn.instances) == 2
    assert not {e.input for e in drawn.examples} & {i.input for i in drawn.instances}


def test_rank_classification_sets_are_known_by_their_labels(tmp_path: Path) -> None:
    _write_set(tmp_path / "sets" / "RTE", "train", "test")
    _write_set(tmp_path / "sets" / "CB", "test")
    cb, rte = read_evaluation_tasks(tmp_path / "sets")
    assert (cb.name, cb.choices, cb.test, len(cb.examples)) == ("CB", ("a", "b"), None, 6)
    assert rte.test is not None
    assert rte.test[1] == Example("test 1", ("b",))
    assert read_evaluation_tasks(tmp_path / "sets" / "RTE") == [rte]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("labels.json", '["a"]', "labels.json must be a list of at least two choices"),
        ("labels.json", "[", "labels.json cannot be read as JSON"),
        ("test.json", '[{"sentence": "x", "label": "c"}]', "test.json, row 0 has the label 'c'"),
        ("test.json", '[{"sentence": "x", "label": "a"}, {"label": "a"}]', "test.json, row 1 has no sentence"),
        ("test.json", "[]", "test.json must be a list of at least one row"),
    ],
)
def test_bad_sets_are_named_by_file_and_row(tmp_path: Path, file: str, content: str, reason: str) -> None:
    _write_set(tmp_path / "RTE", "test")
    (tmp_path / "RTE" / file).write_text(content)
    with pytest.raises(InvalidInput, match=reason):
        read_evaluation_tasks(tmp_path / "RTE")


def test_a_set_without_parts_is_refused(tmp_path: Path) -> None:
    _write_set(tmp_path / "RTE")
    with pytest.raises(InvalidInput, match=r"neither train.json nor test.json"):
        read_evaluation_tasks(tmp_path / "RTE")


def test_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"input": "x", "output": ["y", "z"], "instruction": "Do."}\n')
    [task] = read_evaluation_tasks(tmp_path, ["two"])
    assert task == EvaluationTask("two", "Do.", (Example("x", ("y", "z")),))
    with pytest.raises(InvalidInput, match=r"no task three in .*; it has one, two"):
        read_evaluation_tasks(tmp_path, ["one", "three"])


def test_the_digest_tells_contents_apart() -> None:
    task = EvaluationTask("t", "Do.", _examples(3))
    assert task.digest == EvaluationTask("t", "Do.", _examples(3)).digest
    assert (
        len(
            {
                task.digest,
                EvaluationTask("t", "Do!", _examples(3)).digest,
                EvaluationTask("t", "Do.", _examples(4)).digest,
            }
        )
        == 3
    )


@pytest.mark.skipif("MHR_TEST_DATA" not in os.environ, reason="MHR_TEST_DATA names no folder with superni and p3")
def test_real_tasks_are_read_in_both_formats() -> None:
    folder = Path(os.environ["MHR_TEST_DATA"])
    generating, ranking = read_evaluation_tasks(folder / "superni" / "test"), read_evaluation_tasks(folder / "p3")
    assert all(len(draw(task, [8, 32], 100, seed=0)[32].instances) == 100 for task in generating)
    assert {task.name: task.choices for task in ranking} == {
        "CB": ("entailment", "contradiction", "neutral"),
        "COPA": ("A", "B"),
        "RTE": ("contradiction", "entailment"),
    }
    assert {task.name: len(draw(task, [32], 1000, seed=0)[32].instances) for task in ranking} == {
        "CB": 56,
        "COPA": 100,
        "RTE": 277,
    }
